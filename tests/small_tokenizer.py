"""A real tokenizer of some 300 ids, trained in a moment and saved as transformers saves one."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

WORDS = "the quick brown fox jumps over the lazy dog; what does it say? it says nothing. "
BEGIN, END = 0, 1  # ids of <s> and </s>
# What a chat template that marks the assistant's tokens looks like.
CHAT = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "<a>{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}<u>{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)
UNMARKED_CHAT = "{% for message in messages %}<a>{{ message['content'] }}{% endfor %}"


def write_tokenizer(folder: Path, *, chat: str | None = None, begins: bool = False) -> None:
    """Train byte pairs on a few words; ``begins``: each text begins with <s>, as Llama's do."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<s>", "</s>", "<u>", "<a>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([WORDS], trainer)
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BEGIN)]
        )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = chat
    fast.save_pretrained(folder)
