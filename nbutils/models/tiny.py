"""The tiny base: a real Llama of about 3 M parameters, made from nothing, offline, in about a minute.

Run as: `python -m nbutils.models.tiny` (prints where the model is and what it has learned).

It has what Llama 3.1 has and what matters to FSDP and QLoRA: grouped-query attention, an untied output head, the
Llama 3.1 scaling of rotary frequencies, bf16 weights in safetensors, the same special tokens and chat layout. It is
trained on the prose in `data/prose`, so that it knows something and fine-tuning shows.
"""

import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from nbutils.common.paths import ROOT
from nbutils.data.templates import LLAMA31_TEMPLATE

PROSE = ROOT / "data" / "prose"
CACHE = ROOT / "runs" / "cache"

VOCABULARY = 1024
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
)
# Words, numbers of up to three digits, punctuation and blanks are never merged into one token.
WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

STEPS = 200
ROWS, LENGTH = 16, 128  # a batch is (16, 128) tokens
LEARNING_RATE = 1.5e-3
SEED = 0
THREADS = 2  # a sum in another order rounds otherwise, so the number of threads is part of the recipe


def tiny_config() -> LlamaConfig:
    """The shape of the tiny base: 4 layers of width 256, 8 query heads sharing 4 key-value heads."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        bos_token_id=SPECIAL_TOKENS.index("<|begin_of_text|>"),
        eos_token_id=SPECIAL_TOKENS.index("<|eot_id|>"),
        pad_token_id=SPECIAL_TOKENS.index("<|finetune_right_pad_id|>"),
        attention_bias=False,
    )


def tiny_base(cache: Path = CACHE) -> Path:
    """Return the folder of the tiny base, and make it first if it is not there.

    The folder's name carries a digest of this file, the prose and the version of torch: change one and a new base is
    made.

    Args:
        cache: folder that holds made models.

    Returns:
        A folder that `from_pretrained` reads, with `tiny.json` beside the weights: what was made, and its losses.
    """
    folder = cache / f"tiny-{_digest()}"
    if not (folder / "tiny.json").exists():
        partial = cache / f"{folder.name}.{os.getpid()}.part"
        _make(partial)
        if folder.exists():  # another process was faster
            shutil.rmtree(partial)
        else:
            partial.rename(folder)
    return folder


def read_prose(folder: Path = PROSE) -> tuple[list[str], list[str]]:
    """Split the prose into paragraphs for training and for holding out (every twelfth).

    Args:
        folder: holds the essays, `*.md`.

    Returns:
        `(train, heldout)`, lists of paragraphs.

    Raises:
        FileNotFoundError: the folder holds no essay.
    """
    essays = sorted(folder.glob("*.md"))
    if not essays:
        raise FileNotFoundError(f"There is no *.md file in {folder}, and the tiny base is trained on them.")
    paragraphs = [
        p.strip() for essay in essays for p in essay.read_text(encoding="utf-8").split("\n\n") if p.strip()
    ]
    train = [p for i, p in enumerate(paragraphs) if i % 12 != 7]
    heldout = [p for i, p in enumerate(paragraphs) if i % 12 == 7]
    return train, heldout


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer of `VOCABULARY` tokens with Llama 3.1's special tokens and chat layout.

    Args:
        texts: what to count pairs of symbols in.

    Returns:
        A fast tokenizer that puts `<|begin_of_text|>` first.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        chat_template=LLAMA31_TEMPLATE,
        model_max_length=2048,
        padding_side="right",
    )


def _digest() -> str:
    parts = [Path(__file__).read_bytes(), LLAMA31_TEMPLATE.encode(), torch.__version__.encode()]
    parts += [essay.read_bytes() for essay in sorted(PROSE.glob("*.md"))]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:12]


def _stream(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str]) -> torch.Tensor:
    """All paragraphs as one row of token ids, shape (tokens,), each between begin and end of text."""
    texts = [f"<|begin_of_text|>{p}<|end_of_text|>" for p in paragraphs]
    return torch.tensor([i for text in texts for i in tokenizer(text)["input_ids"]])


def _heldout_loss(model: LlamaForCausalLM, stream: torch.Tensor) -> float:
    """Mean loss in nats a token over consecutive windows of the stream, shape (tokens,)."""
    windows = stream[: len(stream) // LENGTH * LENGTH].view(-1, LENGTH)
    model.eval()
    with torch.no_grad():
        return sum(model(w, labels=w).loss.item() for w in windows.split(ROWS)) / len(windows.split(ROWS))


def _make(folder: Path) -> None:
    started = time.monotonic()
    threads = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    torch.manual_seed(SEED)
    train_texts, heldout_texts = read_prose()
    tokenizer = train_tokenizer(train_texts)
    model = LlamaForCausalLM(tiny_config())
    train, heldout = _stream(tokenizer, train_texts), _stream(tokenizer, heldout_texts)
    _train(model, train)
    model.to(torch.bfloat16)
    heldout_loss = _heldout_loss(model, heldout)
    torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "train_tokens": len(train),
        "heldout_tokens": len(heldout),
        "steps": STEPS,
        "heldout_loss": round(heldout_loss, 4),
        "uniform_loss": round(math.log(VOCABULARY), 4),
        "share_of_uniform": round(heldout_loss / math.log(VOCABULARY), 4),
        "seconds": round(time.monotonic() - started, 1),
    }
    (folder / "tiny.json").write_text(json.dumps(facts, indent=2) + "\n")


def _train(model: LlamaForCausalLM, stream: torch.Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS, pct_start=0.1)
    model.train()
    for _ in range(STEPS):
        starts = torch.randint(len(stream) - LENGTH, (ROWS,))
        batch = torch.stack([stream[s : s + LENGTH] for s in starts])  # (ROWS, LENGTH)
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def main() -> None:
    """Make the tiny base if need be, and print where it is and what it has learned."""
    folder = tiny_base()
    facts = json.loads((folder / "tiny.json").read_text(encoding="utf-8"))
    print(f"{folder.relative_to(ROOT)}: {facts['parameters'] / 1e6:.2f} M parameters")
    print(
        f"held-out loss {facts['heldout_loss']:.2f} nats a token, {facts['share_of_uniform']:.0%} of guessing "
        f"uniformly ({facts['uniform_loss']:.2f}); trained {facts['steps']} steps in {facts['seconds']:.0f} s"
    )


if __name__ == "__main__":
    main()
