"""What tokens cost, and when: price lists as CSV files, exact decimals. Reference api B.12.

A row of a list holds for one model and one period. The periods of a model follow each other without gap or overlap; a
list that breaks this is refused with the line. The price of a request is that of the moment at which it came.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from pathlib import Path

from fathom.errors import ConfigError

LISTS = Path(__file__).parent / "pricelists"

LAUNCH = datetime(2026, 4, 24, tzinfo=UTC)
"""When V4 appeared; its prices of that day are the ones usually compared."""

MILLION = Decimal(1_000_000)

_PRICE = (Decimal(1_000_000), 9)
_FACTOR = (Decimal(100), 2)
"""Numbers below so much and with so many decimals: their products and sums fit in Python's 28 digits, unrounded."""

_COLUMNS = ("model", "from", "until", "hit", "miss", "output", "peak_factor", "peak_hours", "note")
_DAYS = ("Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun")
_HOURS = re.compile(r"(\w{3})-(\w{3})((?: \d\d:\d\d-\d\d:\d\d)+)")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens by what they cost: of the prompt those found in the cache and those not, and the generated ones."""

    hit: int = 0
    miss: int = 0
    output: int = 0


@dataclass(frozen=True, slots=True)
class Peak:
    """Days (0 is Monday) and spans of minutes of a day (UTC, from .. before) at which prices are multiplied."""

    factor: Decimal
    days: frozenset[int]
    hours: tuple[tuple[int, int], ...]

    def at(self, moment: datetime) -> bool:
        """Whether `moment` lies in it."""
        clock = moment.astimezone(UTC)
        minute = 60 * clock.hour + clock.minute
        return clock.weekday() in self.days and any(a <= minute < b for a, b in self.hours)


@dataclass(frozen=True, slots=True)
class Price:
    """One row of a list: USD per million tokens from `begin` to before `end` (None: open)."""

    model: str
    begin: datetime
    end: datetime | None
    hit: Decimal | None
    miss: Decimal
    output: Decimal
    peak: Peak | None
    note: str
    where: str

    @property
    def version(self) -> str:
        """The name under which a bill remembers this row."""
        return f"{self.model}@{self.begin:%Y-%m-%dT%H:%MZ}"

    def holds(self, moment: datetime) -> bool:
        """Whether `moment` lies in the row's period."""
        return self.begin <= moment and (self.end is None or moment < self.end)

    def amount(self, tokens: Tokens, moment: datetime) -> Decimal:
        """USD, exact: nothing is rounded."""
        hit = self.miss if self.hit is None else self.hit
        usual = tokens.hit * hit + tokens.miss * self.miss + tokens.output * self.output
        return usual * (self.peak.factor if self.peak and self.peak.at(moment) else 1) / MILLION


class PriceBook:
    """All rows of some lists, by model."""

    def __init__(self, prices: Iterable[Price]) -> None:
        self._rows: dict[str, list[Price]] = {}
        for price in prices:
            self._rows.setdefault(price.model, []).append(price)
        for rows in self._rows.values():
            rows.sort(key=lambda price: price.begin)
            _check_periods(rows)

    @staticmethod
    def load(files: Sequence[Path] | None = None) -> PriceBook:
        """The given lists, or the project's own. Raises ConfigError with the file and the line."""
        paths = sorted(LISTS.glob("*.csv")) if files is None else files
        return PriceBook(price for path in paths for price in _read(path))

    @property
    def models(self) -> tuple[str, ...]:
        """The models that have prices."""
        return tuple(self._rows)

    def price(self, model: str, moment: datetime) -> Price:
        """The row that holds at `moment`. Raises ConfigError for a model or a time without one."""
        rows = self._rows.get(model)
        if not rows:
            raise ConfigError(f"no prices for '{model}': there are {', '.join(self.models)}")
        for row in rows:
            if row.holds(moment):
                return row
        raise ConfigError(f"no price for '{model}' at {moment:%Y-%m-%d %H:%M} UTC: its first is of {rows[0].begin:%F}")

    def amount(self, model: str, tokens: Tokens, moment: datetime) -> Decimal:
        """What the tokens of one request cost, in USD."""
        return self.price(model, moment).amount(tokens, moment)


def _read(path: Path) -> Iterator[Price]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"price list {path} cannot be read: {error}") from None
    numbers = [n for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    if not numbers or tuple(_cells(lines[numbers[0] - 1], f"{path}, line {numbers[0]}")) != _COLUMNS:
        raise ConfigError(f"price list {path}: the first line must name the columns {','.join(_COLUMNS)}")
    for number in numbers[1:]:
        where = f"{path}, line {number}"
        cells = _cells(lines[number - 1], where)
        if len(cells) != len(_COLUMNS):
            raise ConfigError(f"{where}: {len(cells)} columns where {len(_COLUMNS)} are wanted")
        yield _price(dict(zip(_COLUMNS, cells, strict=True)), where)


def _cells(line: str, where: str) -> list[str]:
    """The cells of one row, which is one line."""
    try:
        return next(csv.reader([line], strict=True))
    except csv.Error as error:
        raise ConfigError(f"{where}: a row must be one line of CSV: {error}") from None


def _price(cells: Mapping[str, str], where: str) -> Price:
    if not cells["model"]:
        raise ConfigError(f"{where}: the model has no name")
    return Price(
        model=cells["model"],
        begin=_moment(cells["from"], where),
        end=_moment(cells["until"], where) if cells["until"] else None,
        hit=_number(cells["hit"], where) if cells["hit"] else None,
        miss=_number(cells["miss"], where),
        output=_number(cells["output"], where),
        peak=_peak(cells["peak_factor"], cells["peak_hours"], where),
        note=cells["note"],
        where=where,
    )


def _moment(text: str, where: str) -> datetime:
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"{where}: '{text}' is no time: write 2026-04-24T00:00Z") from None
    if moment.tzinfo is None:
        raise ConfigError(f"{where}: '{text}' names no time zone: write 2026-04-24T00:00Z")
    try:
        return moment.astimezone(UTC)
    except OverflowError:
        raise ConfigError(f"{where}: '{text}' is before the first or after the last day there is") from None


def _number(text: str, where: str, bounds: tuple[Decimal, int] = _PRICE) -> Decimal:
    most, decimals = bounds
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise ConfigError(f"{where}: '{text}' is no number") from None
    if not number.is_finite() or number < 0:
        raise ConfigError(f"{where}: {text} is no price: it must be 0 or more")
    if number >= most or round(number, decimals) != number:
        raise ConfigError(f"{where}: {text} is too fine or too large: below {most}, at most {decimals} decimals")
    return number


def _peak(factor: str, hours: str, where: str) -> Peak | None:
    if not factor and not hours:
        return None
    found = _HOURS.fullmatch(hours)
    if not found or not {found[1], found[2]} <= set(_DAYS):
        raise ConfigError(f"{where}: peak hours '{hours}': write Mon-Fri 01:00-04:00 06:00-10:00")
    try:
        spans = tuple(_span(span) for span in found[3].split())
    except ValueError as error:
        raise ConfigError(f"{where}: peak hours '{hours}': {error}") from None
    first, last = _DAYS.index(found[1]), _DAYS.index(found[2])
    days = frozenset((first + n) % 7 for n in range((last - first) % 7 + 1))
    return Peak(_number(factor, where, _FACTOR), days, spans)


def _span(text: str) -> tuple[int, int]:
    """Minutes of a day, whose end is 24:00."""
    begin, end = (60 * int(part[:2]) + int(part[3:]) for part in text.split("-"))
    if end > 24 * 60 or any(int(part[3:]) > 59 for part in text.split("-")):
        raise ValueError(f"{text} is no time of a day")
    if begin >= end:
        raise ValueError(f"{text} ends before it begins")
    return begin, end


def _check_periods(rows: Sequence[Price]) -> None:
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        if row.end is not None and row.end <= row.begin:
            raise ConfigError(f"{row.where}: the period of '{row.model}' ends before it begins")
        if following is None:
            continue
        if row.end is None or following.begin < row.end:
            raise ConfigError(f"{following.where}: the period of '{row.model}' overlaps the one before ({row.where})")
        if following.begin > row.end:
            raise ConfigError(
                f"{following.where}: '{row.model}' has no price from {row.end:%F %R} to {following.begin:%F %R}"
            )
