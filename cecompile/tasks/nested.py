"""Lists and objects that a cell of a text file holds as text, as CSV keeps them."""

import ast
import io
import json
import tokenize
from typing import Any

from cecompile.errors import UserError

_NUMPY = "written as NumPy prints it; save the rows as JSON lines or Parquet, or write the list as JSON"


def read_nested(value: Any, field: str, where: str) -> Any:
    """The list or object that a text writes in JSON's or Python's syntax; any other value as given.

    Numbers and truth values inside stay the texts that are written.

    Raises:
        UserError: the text is a list as NumPy prints lists, which cannot be told from a list of one item.
    """
    if not isinstance(value, str) or not value.strip().startswith(("[", "{", "(", "array(")):
        return value
    try:
        return _as_text(json.loads(value, parse_int=str, parse_float=str, parse_constant=str))
    except (ValueError, RecursionError, MemoryError):
        pass
    try:
        return _of_node(ast.parse(value.strip(), mode="eval").body, value.strip())
    except _PrintedByNumPyError:
        raise UserError(f"{where}: field '{field}': {_NUMPY}") from None
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return value


class _PrintedByNumPyError(Exception):
    """A list without commas between its texts, or an array."""


def _as_text(value: Any) -> Any:
    """A JSON value with truth values and null as the texts that JSON writes."""
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, dict):
        return {key: _as_text(item) for key, item in value.items()}
    return value if isinstance(value, str) else json.dumps(value)


def _of_node(node: ast.expr, source: str) -> Any:
    """The value of a part of a Python expression: lists, objects and texts; all else as written."""
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_of_node(item, source) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_of_node(key, source) for key in node.keys if key is not None]
        return dict(zip(keys, (_of_node(item, source) for item in node.values), strict=True))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "array":
        raise _PrintedByNumPyError
    written = ast.get_source_segment(source, node) or ""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        tokens = tokenize.generate_tokens(io.StringIO(f"({written})").readline)
        if sum(token.type == tokenize.STRING for token in tokens) > 1:
            raise _PrintedByNumPyError
        return node.value
    ast.literal_eval(node)  # ValueError for anything but a number, a truth value or None
    return written
