"""Converts a model in Hugging Face format to an Orbax checkpoint that `decode.load` opens.

    python -m experiments.convert --model FOLDER_OR_NAME --output_dir DIR

DIR receives params/ (Orbax), config.json, and the tokenizer's files.
"""

from __future__ import annotations

import os
import pathlib
import shutil
from collections.abc import Sequence

import jax
from absl import flags

from experiments import program
from hd_jax.models import tokenizer, weights

_MODEL = flags.DEFINE_string("model", None, "Model folder, or the name of a model on the Hugging Face hub.", required=True)
_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Folder for the checkpoint.", required=True)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, weights.DTYPES, "Of the stored weights; by default bfloat16 for a model in bfloat16, else float32."
)


def convert(model: str, output: pathlib.Path, dtype: str | None) -> int:
    """Writes the checkpoint and returns the number of parameters.

    Raises:
      ValueError: no such model, weights that do not fit config.json, no tokenizer, or a checkpoint stands in `output`.
    """
    if (output / "params").exists():
        raise ValueError(f"{output} holds a checkpoint (params/) already; name another --output_dir or remove it")
    folder = weights.resolve(model)
    if folder.resolve() == output.resolve():
        raise ValueError(f"{output} is the model's own folder; name another --output_dir")
    output.mkdir(parents=True, exist_ok=True)
    if not os.access(output, os.W_OK):
        raise ValueError(f"{output} cannot be written to")
    chat = tokenizer.load(folder)
    if dtype is None:
        dtype = "bfloat16" if weights.stored_dtype(folder) == "bfloat16" else "float32"
    config, params = weights.load(folder, dtype)
    weights.save_orbax(output, config, params)
    for pattern in weights.DESCRIPTION_PATTERNS:
        for path in folder.glob(pattern):
            if not path.name.endswith(".index.json"):  # The map of the shards that stay behind.
                shutil.copyfile(path, output / path.name)
    template = chat.chat_template
    if template is not None and template in tokenizer.TEMPLATES.values():
        # Chosen by the model's name, which the new folder need not bear.
        (output / "chat_template.jinja").write_text(template, encoding="utf-8")
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def main(argv: Sequence[str]) -> None:
    del argv
    output = pathlib.Path(_OUTPUT_DIR.value)
    count = convert(_MODEL.value, output, _DTYPE.value)
    print(f"{output}: {count:,} parameters")


if __name__ == "__main__":
    program.run(main)
