"""Annotation files as text, rows and objects. What cannot be used is named with its file and row."""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.files import PICTURE_SUFFIXES, VIDEO_SUFFIXES, DataError

SPLITS = ("train", "val", "test")
COLUMNS = ("video", "caption", "split", "start", "end")  # of your own annotations
NO_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL, and halves of surrogate pairs: in no name, and no caption
MISSING = {"nan", "<na>", "none", "null"}  # what programs write for a cell without a value
LIST = re.compile(r"\[\s*(['\"]).*\1\s*\]", re.DOTALL)  # a list that a program wrote into one cell


def read_text(path: Path) -> str:
    """The content of a UTF-8 file. A byte order mark is removed. Raises DataError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} cannot be read as UTF-8 ({error}): save it as UTF-8.") from None
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror}): check the file and its permissions."
        ) from None


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that are not blank, without LF or CRLF."""
    return [line.rstrip("\r") for line in read_text(path).split("\n") if line.strip()]


def read_json(path: Path):
    """The content of a JSON file. Raises DataError if it is not valid JSON."""
    try:
        return json.loads(read_text(path))
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not a complete JSON file ({error}): download it again.") from None


# ---- CSV


def like_name(text: str) -> bool:
    """Whether a text could name a video: it has a known extension, or is a word of letters and digits."""
    suffix, word = Path(text).suffix.lower(), r"(?=.*\d)(?=.*[a-zA-Z])[\w@.-]+"
    return suffix in VIDEO_SUFFIXES | PICTURE_SUFFIXES or bool(re.fullmatch(word, text))


def read_rows(
    path: Path, *columns: str, is_name: Callable[[str], bool] = like_name, trim: bool = False
) -> list[tuple[int, dict[str, str]]]:
    """The rows of a CSV file with a header, as (number, texts). The header is row 1; blank rows are left out.

    columns: those that it must have; the first holds names, without blanks around them. is_name: whether a
    text is such a name. trim: blanks between a comma and a quotation mark do not count. Raises DataError if a
    column is missing or there twice, for a row with more fields than the header, for a quotation mark that is
    not closed, and for a text with line breaks that holds another row: then its quotation marks belong to two
    texts."""
    (_, header), *rest = list(_records(path, trim)) or [(1, [])]
    header = [name.strip() for name in header]
    wanted, found = ",".join(columns), ", ".join(header)[:200] or "nothing"
    if not rest or not set(columns) <= set(header):
        raise DataError(f"{path} needs the columns {wanted} in its first line, then rows; found: {found}.")
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{path} has the column {twice[0]} twice: rename or remove one.")
    rows, position = [], header.index(columns[0])
    for number, fields in rest:
        where = f"{path}, row {number}"
        if any(field.strip() for field in fields[len(header) :]):
            advice = "put quotation marks around a text that holds commas"
            raise DataError(f"{where}: {len(fields)} fields for {len(header)} columns; {advice}.")
        broken = [field for field in fields if "\n" in field or "\r" in field]
        for line in (line for field in broken for line in field.splitlines()):
            cells = [cell.strip(' "') for cell in line.split(",")]
            if len(cells) == len(header) > 3 or (1 < len(cells) > position and is_name(cells[position])):
                advice = "close the quotation mark before it, or write the text without line breaks"
                raise DataError(f"{where}: one text holds another row, {line[:60]!r}; {advice}.")
        row = dict(zip(header, fields + [""] * (len(header) - len(fields))))
        row[columns[0]] = row[columns[0]].strip()
        rows.append((number, row))
    return rows


def _records(path: Path, trim: bool) -> Iterator[tuple[int, list[str]]]:
    """The rows of a CSV file that are not blank, with their numbers."""
    number, text = 0, read_text(path)
    if trim:  # before a quotation mark, skipinitialspace does it
        text = re.sub(r'(?<!")("(?:"")*)[ \t]+(?=[,\r\n]|\Z)', r"\1", text)  # behind a closing one
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, skipinitialspace=trim)
    try:
        for number, fields in enumerate(reader, start=1):
            if fields:
                yield number, fields
    except csv.Error as error:
        what = f"a quotation mark is not closed at the end of a text ({error})"
        advice = 'write a text that holds quotation marks or commas as "a ""b"", c"'
        raise DataError(f"{path}, row {number + 1}: {what}; {advice}.") from None


# ---- JSONL


def read_objects(path: Path) -> list[tuple[int, dict[str, object]]]:
    """The objects of a JSONL file, as (number of the line, object). Raises DataError for what is not one."""
    rows = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        try:
            row = json.loads(line, object_pairs_hook=_object) if line.strip() else None
        except (ValueError, RecursionError) as error:
            row, reason = [], str(error)
        else:
            reason = "no object"
        if isinstance(row, dict):
            rows.append((number, row))
        elif line.strip():
            advice = 'write one object in each line, as {"video": "a.mp4", "caption": "a dog runs"}'
            raise DataError(f"{path}, row {number} is not JSONL ({reason}): {advice}.")
    if not rows:
        raise DataError(f"{path} is empty: write one object with a video and a caption in each line.")
    return rows


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError("a key is there twice")
    return row


# ---- values of a cell


def shown(value: object) -> str:
    """A value as JSON, at most 60 characters of it, to print."""
    try:
        text = json.dumps(value)
    except RecursionError:
        return "a deeply nested list"
    return text if len(text) <= 60 else f"{text[:57]}..."


def as_text(value: object, what: str, where: str) -> str:
    """A text without the blanks around it. Raises DataError if there is none, or it is no text."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: the {what} is empty; fill it in or delete the row.")
    if not isinstance(value, str):
        raise DataError(f"{where}: the {what} is {shown(value)}, which is no text; correct it.")
    if found := NO_TEXT.search(value):
        raise DataError(f"{where}: the {what} {shown(value)} holds {found[0]!a}; remove that.")
    return value.strip()


def as_captions(value: object, where: str) -> list[str]:
    """The captions in a cell: one text, or a list of them. Raises DataError for anything else."""
    values = value or [None] if isinstance(value, list) else [value]
    captions = [as_text(value, "caption", where) for value in values]
    for caption in captions:
        if caption.lower() in MISSING or LIST.fullmatch(caption):
            advice = "give each caption its own row, and delete rows without one"
            raise DataError(f"{where}: the caption is the text {shown(caption)}; {advice}.")
    return captions


def as_seconds(value: object, where: str) -> float | None:
    """A time, from a number or a text; None for an empty cell. Raises DataError if it is not finite."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not math.isfinite(seconds):
        raise DataError(f"{where}: start and end are seconds, not {shown(value)}; correct it.")
    return seconds + 0.0  # no -0.0


# ---- your own annotations


@dataclass(frozen=True)
class Row:
    """A row of your own annotations. where: its file and number, for errors; start, end: seconds."""

    where: str
    name: str
    captions: list[str]
    split: str  # may be empty
    start: float
    end: float | None  # None: the end of the file

    @property
    def id(self) -> str:
        """The name, with the window if there is one."""
        whole, end = not self.start and self.end is None, "" if self.end is None else _digits(self.end)
        return self.name if whole else f"{self.name} [{_digits(self.start)}-{end}]"


def _digits(number: float) -> str:
    """A number in as few digits as tell it apart from others; six if they do."""
    return short if float(short := f"{number:g}") == number else repr(number)


def read_own_rows(path: Path, is_name: Callable[[str], bool] = like_name) -> list[Row]:
    """The rows of a CSV or JSONL file of video,caption[,split][,start,end]. is_name: see `read_rows`.

    Raises DataError for a cell that cannot be what its column says, and as the readers of these files do."""
    if path.suffix.lower() == ".jsonl":
        rows = read_objects(path)
    else:
        rows = read_rows(path, "video", "caption", is_name=is_name, trim=True)
    for name in rows[0][1]:
        if name not in COLUMNS and name.strip().lower() in COLUMNS:
            raise DataError(f"{path} has {name!r} for {name.strip().lower()!r}: write it in this form.")
    return [_own_row(cells, f"{path}, row {number}") for number, cells in rows]


def _own_row(cells: dict[str, object], where: str) -> Row:
    name = as_text(cells.get("video"), "video", where)
    if len(name) > 2000 or max(len(part.encode()) for part in name.split("/")) > 255:
        raise DataError(f"{where}: the video {shown(name)} is too long for a file name; correct it.")
    captions, split = as_captions(cells.get("caption"), where), cells.get("split")
    split = split.strip() if isinstance(split, str) else split
    if split not in (None, "", *SPLITS):
        raise DataError(f"{where}: the split of {name} is {shown(split)}; it must be train, val or test.")
    start, end = as_seconds(cells.get("start"), where) or 0.0, as_seconds(cells.get("end"), where)
    if start < 0 or (end is not None and end <= start):
        window = f"{start:g} to {'the end' if end is None else f'{end:g} s'}"
        raise DataError(f"{where}: the window {window} is empty; end must be later than start.")
    return Row(where, name, captions, split or "", start, end)
