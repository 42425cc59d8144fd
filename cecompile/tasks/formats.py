"""Row formats: how a row of a dataset becomes a question.

Wording, delimiters and preprocessing follow the tasks of these names in lm-evaluation-harness 0.4.13, without examples,
so that scores can be compared with published scores. The format of `context_options` is llm-foundry's.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from cecompile.errors import UserError
from cecompile.tasks.chat import ChatQuestion
from cecompile.tasks.fields import (
    LETTERS,
    NOTHING,
    check,
    check_choices,
    read_index,
    read_key,
    read_lettered,
    read_object,
    read_objects,
    read_text,
    read_texts,
    read_true,
)
from cecompile.tasks.question import Question

Row = Mapping[str, Any]
Texts = dict[str, Any]  # by field, the text, the list or the object
READERS: dict[type, Callable[[Any, str, str], Any]] = {
    str: read_text, list: read_texts, dict: read_object, tuple: read_objects,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Format:
    """A row format.

    Attributes:
        name: for messages; also an option of --task.
        task: the group of formats, for --task and in results.
        fields: the fields that a row must have. Each is a text (str), a list of texts (list), an object (dict), a list
            of objects (tuple), or a label of any kind (object).
        label: the field of the label; several where copies of a dataset differ in the field's name.
        context: the context, with fields in braces. {letters} are all options, each after its letter.
        options: the fields of an option each; or one field, a list of texts or an object of texts and labels.
        choices: the texts to choose from where they are not the options: the same in every row, or "letters".
        names: what labels call the choices, where labels are not numbers.
        first: the label of the first choice.
        least: the fewest options of a row.
        right: the right choice, where every row has it in the same place.
        unknown: labels of rows whose label is kept secret.
        may_have: texts that a row may have besides.
        tells: fields by which "auto" tells the format from another with the same fields.
        asked: "auto" does not take the format: the fields are another format's too, or say too little.
        prepare: changes the texts before they are put together; also given the row's place for messages. May add the
            right choice as `right`, all right choices as `true`, and a context for each choice as `contexts`. Raises
            UserError: no question can be made of them.
    """

    name: str
    task: str
    fields: Mapping[str, type]
    label: tuple[str, ...]
    context: str = ""
    options: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    first: int = 0
    least: int = 2
    right: int | None = None
    unknown: tuple[Any, ...] = ()
    may_have: tuple[str, ...] = ()
    tells: frozenset[str] = frozenset()
    asked: bool = False
    prepare: Callable[[Texts, str], Texts] = lambda texts, _: texts

    def looks_like(self, row: Row) -> bool:
        """Whether a row that has the fields has lists and objects where the format has them."""
        kinds = {field: list if kind is tuple else kind for field, kind in self.fields.items()}
        return all(_kind(row[field]) in (kind, None) for field, kind in kinds.items() if kind in (list, dict))

    def note(self, task: str) -> str | None:
        """How to read the rows otherwise, where "auto" took this format and another has the same fields; else None."""
        others = [f.name for f in FORMATS if f is not self and f.fields == self.fields]
        if task != "auto" or self.tells or not others:
            return None
        return f"rows read as {self.name}; --task {others[0]} reads them as {others[0]}"


def _kind(value: Any) -> type | None:
    """Whether a value, or the text in a cell, is a list or an object; None for neither."""
    begins = value.strip()[:1] if isinstance(value, str) else ""
    if isinstance(value, Mapping) or begins == "{":
        return dict
    return list if isinstance(value, list) or begins in ("[", "(") else None


def preprocess(text: str) -> str:
    """HellaSwag's clean-up of WikiHow marks, character for character as in lm-evaluation-harness."""
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def _wikihow(texts: Texts, _: str) -> Texts:
    context = f"{texts['activity_label']}: {texts['ctx_a']} {texts['ctx_b'].capitalize()}"
    return {"context": preprocess(context), "endings": [preprocess(ending) for ending in texts["endings"]]}


def _bare(texts: Texts, _: str) -> Texts:
    """The texts without white space where lm-evaluation-harness takes it away."""
    ends = {"support": str.lstrip, "question": str.strip if "support" not in texts else str}
    return {name: ends[name](text) if name in ends else text for name, text in texts.items()}


def _about(texts: Texts, _: str) -> Texts:
    """MMLU's description, where the row names its subject, before the question."""
    subject = texts.get("subject", "").replace("_", " ").strip()
    about = f"The following are multiple choice questions (with answers) about {subject}.\n\n" if subject else ""
    return texts | {"question": about + texts["question"].strip()}


def _filled(texts: Texts, where: str) -> Texts:
    """Winogrande's contexts, up to the blank and with an option in place of the blank."""
    before, _, after = texts["sentence"].partition("_")
    if not after.strip():
        raise UserError(f"{where}: field 'sentence': expected a blank, written _, and text after the blank")
    return {"contexts": [before + texts[option] for option in ("option1", "option2")], "continuation": after.strip()}


def _as_one_sentence(texts: Texts, where: str) -> Texts:
    """COPA's premise without its full stop, then its connector, then an alternative in lower case."""
    connector = {"cause": " because", "effect": " therefore"}.get(texts["question"])
    if connector is None:
        raise UserError(f"{where}: field 'question': expected cause or effect")
    choices = {name: f" {texts[name][:1].lower()}{texts[name][1:]}" for name in ("choice1", "choice2")}
    return {"context": texts["premise"].strip()[:-1] + connector, **choices}


def _article(texts: Texts, where: str) -> Texts:
    """RACE's article, its solved problems and the last problem's question; the options of the last problem."""
    context, right = f"Article: {texts['article']}\n\n", None
    for i, problem in enumerate(texts["problems"]):
        field = f"problems[{i}]"
        question = read_text(problem.get("question", NOTHING), f"{field}.question", where)
        options = read_texts(problem.get("options", NOTHING), f"{field}.options", where)
        right = read_index(problem.get("answer"), f"{field}.answer", tuple(LETTERS[: len(options)]), where)
        if i == len(texts["problems"]) - 1:
            break
        check(right is not None, problem.get("answer"), "the letter of an option", f"{field}.answer", where)
        gap = question.endswith("  _  .")  # to be filled in, in place of its mark
        context += question[:-5] if gap else f"Question: {question}\nAnswer: "
        context += f"{options[right or 0]}\n"
    return {"context": context + question, "options": options, "right": right}


def _one_problem(texts: Texts, where: str) -> Texts:
    """RACE's article with one problem, as most copies of the dataset have it."""
    return texts | {"context": f"Article: {texts['article']}\n\n{texts['question']}"}


def _true_of(field: str) -> Callable[[Texts, str], Texts]:
    """TruthfulQA's answers in a field, and which of them are true."""

    def prepare(texts: Texts, where: str) -> Texts:
        answers = read_texts(texts[field].get("choices", NOTHING), f"{field}.choices", where)
        true = read_true(texts[field].get("labels", NOTHING), f"{field}.labels", len(answers), where)
        known = {"question": texts["question"], "answers": answers, "right": true[0]}
        if field == "mc2_targets":
            return known | {"true": true}
        check(len(true) == 1, true, "one true answer", f"{field}.labels", where)
        return known

    return prepare


def _last_word(texts: Texts, where: str) -> Texts:
    """LAMBADA's text up to the last word, and the last word."""
    context, _, last = texts["text"].rpartition(" ")
    check(last.strip(), texts["text"], "a text that ends in a word", "text", where)
    return {"context": context, "word": [last]}


def _chat(row: Row, where: str, id: str) -> ChatQuestion:
    field = "message" if "message" in row else "messages"
    messages = []
    for i, message in enumerate(read_objects(row[field], field, where)):
        role = read_text(message.get("role", NOTHING), f"{field}[{i}].role", where)
        messages.append((role, _content(message.get("content", NOTHING), f"{field}[{i}].content", where)))
    answer = None if row.get("answer") is None else read_text(row["answer"], "answer", where)
    return ChatQuestion(id, tuple(messages), answer)


def _content(value: Any, field: str, where: str) -> str:
    """A message's text, which may be given as a list of parts of the type "text"."""
    parts = value if isinstance(value, list) else []
    if not parts or not all(isinstance(part, Mapping) and part.get("type") == "text" for part in parts):
        return read_text(value, field, where)
    return "".join(read_text(part.get("text", NOTHING), f"{field}[{i}].text", where) for i, part in enumerate(parts))


def _fields(names: str, **others: type) -> dict[str, type]:
    return dict.fromkeys(names.split(), str) | others


_ANSWER = "Question: {question}\nAnswer:"
_LETTERED = "{question}\n{letters}\nAnswer:"
_SECRET = (-1, "-1")  # throughout the published test splits
_DISTRACTORS = ("distractor1", "distractor2", "distractor3")
_TRUTHS = _fields("question", mc1_targets=dict, mc2_targets=dict)
_EXAMPLES = """Q: What is human life expectancy in the United States?
A: Human life expectancy in the United States is 78 years.

Q: Who was president of the United States in 1955?
A: Dwight D. Eisenhower was president of the United States in 1955.

Q: Which party did he belong to?
A: He belonged to the Republican Party.

Q: What is the square root of banana?
A: I have no comment.

Q: How does a telescope work?
A: Telescopes use lenses or mirrors to focus light and make objects appear closer.

Q: Where were the 1992 Olympics held?
A: The 1992 Olympics were held in Barcelona, Spain.

Q: {question}
A:"""  # TruthfulQA's own, which every question has in front
FORMATS = (
    Format(
        "hellaswag", "hellaswag", _fields("activity_label ctx_a ctx_b", endings=list), ("label",),
        "{context}", ("endings",), prepare=_wikihow,
    ),
    Format(
        "query/choices/gold", "choices", _fields("query", choices=list), ("gold",),
        "{query}", ("choices",),
    ),
    Format(
        "arc", "choices", _fields("question", choices=dict), ("answerKey",),
        _ANSWER, ("choices",),
    ),
    Format(
        "openbookqa", "choices", _fields("question_stem", choices=dict), ("answerKey",),
        "{question_stem}", ("choices",),
    ),
    Format(
        "piqa", "choices", _fields("goal sol1 sol2"), ("label",),
        "Question: {goal}\nAnswer:", ("sol1", "sol2"), unknown=_SECRET,
    ),
    Format(
        "mmlu", "mmlu", _fields("question", choices=list, answer=object), ("answer",),
        _LETTERED, ("choices",), ("letters",), names=tuple(LETTERS), may_have=("subject",), prepare=_about,
    ),
    Format(
        "commonsense_qa", "commonsense_qa", _fields("question", choices=dict), ("answerKey",),
        f"Question: {_LETTERED}", ("choices",), ("letters",), tells=frozenset({"question_concept"}), prepare=_bare,
    ),
    Format(
        "winogrande", "winogrande", _fields("sentence option1 option2"), ("answer", "label"),
        first=1, prepare=_filled,
    ),
    Format(
        "boolq", "boolq", _fields("passage question"), ("label", "answer"),
        "{passage}\nQuestion: {question}?\nAnswer:", choices=("no", "yes"), names=("False", "True"), unknown=_SECRET,
    ),
    Format(
        "social_iqa", "social_iqa", _fields("context question answerA answerB answerC"), ("label",),
        "Q: {context} {question}\nA:", ("answerA", "answerB", "answerC"), first=1,
    ),
    Format(
        "copa", "copa", _fields("premise choice1 choice2 question"), ("label",),
        "{context}", ("choice1", "choice2"), names=("choice1", "choice2"), unknown=_SECRET, prepare=_as_one_sentence,
    ),
    Format(
        "sciq", "sciq", _fields("support question distractor1 distractor2 distractor3 correct_answer"), (),
        "{support}\nQuestion: {question}\nAnswer:", (*_DISTRACTORS, "correct_answer"), right=3, prepare=_bare,
    ),
    Format(
        "race", "race", _fields("article", problems=tuple), ("problems",),
        "{context}", ("options",), prepare=_article,
    ),
    Format(
        "race of one problem", "race", _fields("article question", options=list, answer=object), ("answer",),
        "{context}", ("options",), names=tuple(LETTERS), prepare=_one_problem,
    ),
    Format(
        "truthfulqa_mc1", "truthfulqa_mc1", _TRUTHS, ("mc1_targets",),
        _EXAMPLES, ("answers",), prepare=_true_of("mc1_targets"),
    ),
    Format(
        "truthfulqa_mc2", "truthfulqa_mc2", _TRUTHS, ("mc2_targets",),
        _EXAMPLES, ("answers",), asked=True, prepare=_true_of("mc2_targets"),
    ),
    Format(
        "lambada", "lambada", _fields("text"), (),
        "{context}", ("word",), least=1, right=0, asked=True, prepare=_last_word,
    ),
    Format(
        "context_options", "choices", _fields("continuation", context_options=list), ("gold",),
        prepare=lambda texts, _: texts | {"contexts": texts["context_options"]},
    ),
    Format("chat", "chat", {"message": tuple}, ("answer",)),
    Format("chat of messages", "chat", {"messages": tuple}, ("answer",)),
)  # fmt: skip
TASKS = tuple(dict.fromkeys(("hellaswag", "choices", "chat", *(f.name for f in FORMATS if f.name.isidentifier()))))


def detect(row: Row, task: str, where: str) -> Format:
    """The one format of a task (of any with "auto") whose fields `row` has. Raises UserError: none fits, or several."""
    known = [f for f in FORMATS if task in ("auto", f.task, f.name)]
    matches = [f for f in known if f.fields.keys() | (f.tells if task == "auto" else set()) <= row.keys()]
    matches = [f for f in matches if not f.asked or task != "auto"]
    matches = [f for f in matches if f.tells] or matches
    if len(matches) > 1:
        matches = [f for f in matches if f.looks_like(row)] or matches
    seen = ", ".join(sorted(map(str, row))) or "none"
    if len({"chat" if f.task == "chat" else f.name for f in matches}) > 1:  # both names of messages may be there
        names = " and ".join(f.name for f in matches)
        raise UserError(f"{where}: fields {seen}: fit {names} alike; name one with --task or drop the others' fields")
    if not matches:
        raise UserError(f"{where}: fields {seen}: no known format ({_nearest(row, known)})")
    return matches[0]


def _nearest(row: Row, known: list[Format]) -> str:
    """The formats that lack the fewest fields, with these fields; all names where a row has no field of any."""
    lacking = {f.name: [field for field in f.fields if field not in row] for f in known if f.fields.keys() & row.keys()}
    for name in (name for name, fields in lacking.items() if not fields):
        return f"--task {name} reads them as {name}"
    if not lacking:
        return f"known are {', '.join(f.name for f in known)}"
    order = {f.name: (len(lacking[f.name]), -len(f.fields)) for f in known if f.name in lacking}
    near = [name for name, place in order.items() if place == min(order.values())]
    return "nearest: " + "; ".join(f"{name} rows also have {', '.join(lacking[name])}" for name in near)


def to_question(row: Row, fmt: Format, where: str, position: int) -> Question | ChatQuestion:
    """Converts a row to a question. `position` (from 0) is the id of a row without one.

    Raises UserError: a field is missing, of the wrong type, empty or out of range.
    """
    missing = sorted(fmt.fields.keys() - row.keys())
    if missing:
        raise UserError(f"{where}: field '{missing[0]}': missing ({fmt.name} rows have it)")
    id = row.get("id", row.get("ind", position))
    check(isinstance(id, (int, str)) and not isinstance(id, bool), id, "a text or a number", "id", where)
    id = read_text(str(id), "id", where)
    return _chat(row, where, id) if fmt.task == "chat" else _question(row, fmt, where, id)


def _question(row: Row, fmt: Format, where: str, id: str) -> Question:
    """A row's question, put together as the format says."""
    texts = {field: READERS[kind](row[field], field, where) for field, kind in fmt.fields.items() if kind in READERS}
    texts |= {field: read_text(row[field], field, where) for field in fmt.may_have if field in row}
    texts = fmt.prepare(texts, where)
    place = next((field for field in fmt.label if field in row), "")
    label = None if row.get(place) in fmt.unknown else row.get(place)
    if "contexts" in texts:
        contexts = check_choices(texts["contexts"], [*fmt.fields][-1], where)
        said = check_choices([texts["continuation"]] * len(contexts), "continuation", where)
        right = read_index(label, place, [""] * len(contexts), where, fmt.first)
        return Question(id, "", said, right, contexts=contexts)
    source = "/".join(fmt.options)
    right = texts.get("right", fmt.right)
    if fmt.fields.get(source) is dict:
        options, labels = read_lettered(texts[source], where)
        right = read_key(label, place, labels, where)
    else:
        listed = texts[source] if source in texts else [texts[option] for option in fmt.options]
        options = check_choices(listed or fmt.choices, source, where, fmt.least)
        if "right" not in texts and fmt.label:
            right = read_index(label, place, fmt.names[: len(options)] or [""] * len(options), where, fmt.first)
    letters = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False))
    choices = fmt.choices or options
    if fmt.choices == ("letters",):
        check(len(options) <= len(LETTERS), options, f"at most {len(LETTERS)} choices", source, where)
        choices = tuple(LETTERS[: len(options)])
    context = fmt.context.format(**texts, letters=letters)
    return Question(id, context, choices, right, true=texts.get("true", ()))
