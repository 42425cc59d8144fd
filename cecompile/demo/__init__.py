"""The embedded demo: a tiny model and held-out questions about a made-up world (made by scripts/train_demo.py)."""

from pathlib import Path

MODEL = Path(__file__).parent / "model"
HELLASWAG = Path(__file__).parent / "hellaswag.jsonl"
CHAT = Path(__file__).parent / "chat.jsonl"
