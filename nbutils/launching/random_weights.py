"""Random NF4 weights of the real shapes: a dry run needs no download."""

import contextlib
import hashlib
import json
import multiprocessing
import os
import shutil
import time
from pathlib import Path

from nbutils.common.noise import drop_noise
from nbutils.common.paths import RUNS
from nbutils.planning.shapes import Shape, config_of

TOKENIZER_FILES = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja"
)  # fmt: skip


def prepare(shape: Shape, folder: str | Path | None = None) -> Path:
    """Write an NF4 checkpoint of random weights in the given shape, unless it is there already.

    Args:
        shape: of the model.
        folder: where such checkpoints are kept; None means `runs/cache`.

    Returns:
        The folder of the checkpoint: config, tokenizer (of 1,024 tokens, all within the vocabulary) and shards.
    """
    target = Path(folder or RUNS / "cache") / folder_name(shape)
    if not (target / "complete.json").exists():
        making = target.with_name(f"{target.name}.{os.getpid()}.partial")
        shutil.rmtree(making, ignore_errors=True)
        # In a process of its own: its CUDA context must not stay on the GPU that is measured.
        maker = multiprocessing.get_context("spawn").Process(target=_make_weights, args=(shape, making))
        maker.start()
        maker.join()
        if maker.exitcode:
            raise ChildProcessError(f"Making random weights in {making} failed; its message stands above.")
        with contextlib.suppress(OSError):  # another dry run was faster
            making.rename(target)
        shutil.rmtree(making, ignore_errors=True)
    return target


def with_tokenizer(weights: Path, tokenizer: Path, target: Path) -> Path:
    """A folder of the same weights under another tokenizer: links to the ones, copies of the other.

    Args:
        weights: from `prepare`.
        tokenizer: a folder that holds the files of a tokenizer, with or without a model.
        target: a new folder.

    Returns:
        `target`.
    """
    target.mkdir(parents=True)
    for file in weights.iterdir():
        if not _of_tokenizer(file):
            (target / file.name).symlink_to(file.resolve())
    for file in filter(_of_tokenizer, tokenizer.iterdir()):
        shutil.copy(file, target)
    return target


def _of_tokenizer(file: Path) -> bool:
    return any(file.match(pattern) for pattern in TOKENIZER_FILES)


def folder_name(shape: Shape) -> str:
    """By the model's name, for a reader, and by all that decides about its weights: two models may share a name."""
    content = {name: value for name, value in vars(shape).items() if name != "name"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return f"random-{shape.name}-{shape.layers}-{digest[:8]}"


def _make_weights(shape: Shape, target: Path) -> None:
    import torch

    from nbutils.models.loading import empty_model, linear_weights
    from nbutils.models.nf4 import write_nf4
    from nbutils.models.tiny import read_prose, train_tokenizer

    drop_noise()
    started = time.monotonic()
    config = config_of(shape)
    model = empty_model(config, pre_quantised=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def random_tensors():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                yield name, torch.ones(parameter.shape, dtype=torch.bfloat16)
            else:
                weight = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device)
                yield name, weight.normal_(0.0, 0.02, generator=generator)

    size = write_nf4(target, config, random_tensors(), linear_weights(model), device)
    tokenizer = train_tokenizer(read_prose()[0])
    tokenizer.model_max_length = 131072
    tokenizer.save_pretrained(target)
    facts = {"bytes": size, "seconds": round(time.monotonic() - started, 1)}
    (target / "complete.json").write_text(json.dumps(facts) + "\n")
    print(f"{target}: {size / 1e9:.1f} GB of random NF4 weights in {facts['seconds']:.0f} s", flush=True)
