"""A CUDA device on a machine without triton: plain torch does the work, to the same precision."""

import subprocess
import sys

import torch

from tests.cases import tiles_of
from tests.oracle import oracle, relative_error
from tests.ranks import ROOT
from vocab_parallel import linear_cross_entropy, predict, token_logprobs


def check_without_triton() -> None:
    torch.manual_seed(0)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 5e-3), (torch.float16, 5e-3)):
        e = torch.randn(2, 150, 64, device="cuda").to(dtype).requires_grad_()
        c = (torch.randn(3001, 64, device="cuda") / 8).to(dtype).requires_grad_()
        bias = torch.randn(3001, device="cuda").to(dtype).requires_grad_()
        targets = torch.randint(3001, (2, 150), device="cuda")
        targets[:, ::9] = -100
        options = {
            "softcap": 4.0,
            "shift": 1,
            "label_smoothing": 0.1,
            "z_loss": 1e-3,
            "temperature": 0.7,
            "token_weight": torch.rand(2, 150, device="cuda"),
        }
        wide = [t.detach().double().requires_grad_() for t in (e, c, bias)]
        exact_loss = oracle(wide[0], wide[1], targets, wide[2], **options)[0]
        exact = torch.autograd.grad(exact_loss, wide)
        for backward in ("auto", "recompute", "probs"):
            with tiles_of(rows=1024):
                loss = linear_cross_entropy(e, c, targets, bias, backward=backward, **options)
                found = torch.autograd.grad(loss, (e, c, bias))
            for got, want in zip(found, exact, strict=True):
                assert relative_error(got, want) < tolerance, (dtype, backward)
        token_logprobs(e, c, targets, bias, return_entropy=True)[1].sum().backward()
        assert predict(e, c).ids.shape == (2, 150, 1)
    assert not any(name.startswith("vocab_parallel.kernels.") for name in sys.modules)


def test_without_triton() -> None:
    program = (
        "import sys; sys.modules['triton'] = None;"
        "from tests.gpu.test_without_triton import check_without_triton as check; check()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0, done.stderr[-4000:]
