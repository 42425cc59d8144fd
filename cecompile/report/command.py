"""The command that makes a result again."""

import shlex
from typing import Any


def command_line(results: dict[str, Any]) -> tuple[str, bool]:
    """For a shell: the command that made the result, and whether it was recorded.

    Where it was not, one of the same effect is put together from what the result says.
    """
    if results["command"]:
        return shlex.join(results["command"]), True
    engine = results["engine"]
    arguments = ["cecompile", "eval", "--model", results["model"]["name"], "--data", results["data"]["name"]]
    arguments += ["--task", results["task"], "--limit", str(results["questions"]), "--dtype", results["model"]["dtype"]]
    arguments += ["--engine", engine["name"]]
    if engine["attention"] is not None:
        arguments += ["--attention", engine["attention"]]
    if results["answers"] is not None:
        arguments += ["--max-new-tokens", str(results["answers"]["max_new_tokens"])]
    return shlex.join([*arguments, "--clock", results["headline"]["clock"]]), False
