"""What so many GPUs would do without a pipeline: FSDP2 alone, and FSDP2 x tensor parallelism.

The same batch, by the same arithmetic over the hardware file. What is taken for granted favours
these two, so that a mesh that beats them does:

    memory    weights, gradients and optimizer state are 1 / N each. Of what FSDP2 gathers, two
              layers' weights and gradients are whole at a time, or the classifier with its
              gradient and one layer. Tensor parallelism is sequence-parallel: all that a layer
              keeps is 1 / T but the inputs of its products
    loss      this library's, over the whole classifier, or over 1 / T of its rows
    messages  a microbatch gathers all weights for forward, again for backward, and reduces their
              gradients, each (1 - 1 / D) of the bytes over a GPU's link, hidden behind forward's
              and backward's computation as far as that is long enough. A layer's two gathers and
              two reductions of [tokens, D] each way of tensor parallelism are not hidden
    products  as fast as in whole layers, however they are cut
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from launch.planning.estimate import Job, Mesh
from launch.planning.hardware import Hardware
from launch.planning.loss_time import loss_seconds

_TENSOR = (2, 4, 8, 16)  # degrees of tensor parallelism that are looked at, within a node


@dataclass(frozen=True)
class Unpiped:
    """One way, with the microbatch that is the fastest of those that fit.

    Attributes:
        mesh: data degree D of FSDP2, a pipeline of 1, and in the vocab degree's place T.
        microbatch, count: sequences of a microbatch, and how many a step has.
        recompute_layers: whether layers run again in backward.
        memory: bytes of a GPU.
        step_seconds: of one optimizer step.
        waits: the share of it in which a GPU waits for its links.
        tokens_per_second, flops_per_second: of all GPUs.
        missing: bytes that a GPU lacks; 0 or less where it fits.
    """

    mesh: Mesh
    microbatch: int
    count: int
    recompute_layers: bool
    memory: float
    step_seconds: float
    waits: float
    tokens_per_second: float
    flops_per_second: float
    missing: float

    @property
    def name(self) -> str:
        """What users call it."""
        tensor = self.mesh.vocab
        return "FSDP2 alone" if tensor == 1 else f"FSDP2 x TP, {self.mesh.data} x {tensor}"


def without_pipeline(job: Job, gpus: int, batch: int, hardware: Hardware) -> list[Unpiped]:
    """Plan FSDP2 alone, and the best of its products with tensor parallelism.

    Either is left out where its ranks cannot share the batch, in sequences.
    """
    found = []
    for degrees in ((1,), _TENSOR):
        ways = [one for tensor in degrees for one in _ways(job, gpus, tensor, batch, hardware)]
        if ways:
            found.append(min(ways, key=lambda one: (max(one.missing, 0.0), one.step_seconds)))
    return found


def _ways(job: Job, gpus: int, tensor: int, batch: int, hardware: Hardware) -> Iterator[Unpiped]:
    """Yield each microbatch of one degree, its layers running once and twice."""
    data, shape = gpus // tensor, job.shape
    if gpus % tensor or tensor > hardware.node_gpus or batch % data:
        return
    if shape.heads % tensor or shape.kv_heads % tensor:
        return
    own = batch // data
    for microbatch in (n for n in range(1, own + 1) if own % n == 0):
        for again in (False, True):
            # Whatever the pipeline's schedule, nothing splits a backward here.
            one = replace(job, microbatch=microbatch, recompute_layers=again, schedule="1f1b")
            yield _plan(one, Mesh(data, 1, tensor), own // microbatch, hardware)


def _plan(job: Job, mesh: Mesh, count: int, hardware: Hardware) -> Unpiped:
    shape, tokens, tensor = job.shape, job.tokens, mesh.vocab
    classifier = shape.vocabulary_parameters
    parameters = sum(shape.layer_parameters) + shape.norm_parameters
    parameters += classifier * (1 if shape.tied else 2)
    rows = -(-shape.vocabulary // tensor)
    loss_plan = job.plan_loss(tokens, rows, tensor)
    loss = loss_seconds(loss_plan, tokens, rows, shape.hidden, job.itemsize, hardware)
    layer = max(shape.layer_parameters) / tensor * job.itemsize
    kept = job.activation_bytes(hardware, tensor)
    if job.recompute_layers:
        kept += shape.layers * job.layer_bytes(hardware) / tensor
    else:
        kept *= shape.layers
    memory = (
        parameters / mesh.ranks * (2 * job.itemsize + job.state_bytes)
        + max(4 * layer, layer + classifier / tensor * job.itemsize + loss_plan.peak_bytes)
        + kept
    )
    layers = shape.layers * job.layer_seconds(hardware) / tensor
    again = int(job.recompute_layers)
    forward, backward = layers + loss / 3, (2 + again) * layers + 2 * loss / 3
    gathered = parameters * job.itemsize / tensor * (1 - 1 / mesh.data)
    gather = gathered / hardware.link_of(mesh.ranks)
    message = tokens * shape.hidden * job.itemsize * (1 - 1 / tensor) / hardware.link_of(tensor)
    messages = (2 + again) * 4 * shape.layers * message
    seconds = count * (max(forward, gather) + max(backward, 2 * gather) + messages)
    of_step = tokens * count * mesh.data
    return Unpiped(
        mesh=mesh,
        microbatch=job.microbatch,
        count=count,
        recompute_layers=job.recompute_layers,
        memory=memory,
        step_seconds=seconds,
        waits=1 - count * (forward + backward) / seconds,
        tokens_per_second=of_step / seconds,
        flops_per_second=shape.step_flops(of_step, job.sequence) / seconds,
        missing=memory - hardware.room,
    )
