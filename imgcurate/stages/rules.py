"""What decides on samples by a column of theirs: bounds, and values."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from imgcurate.errors import ConfigError, printable
from imgcurate.value_lists import as_texts, value_list

__all__ = ["AnyRule", "Rule", "ValueRule", "holds_numbers", "rule_of"]

_NUMBERS: Final = (
    pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean, pa.types.is_null,
)  # fmt: skip
_VALUES: Final = (
    pa.types.is_string, pa.types.is_large_string, pa.types.is_integer, pa.types.is_boolean, pa.types.is_null,
)  # fmt: skip
_MAX_SHOWN: Final = 80
_FEW: Final = 4

_OPERATORS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    ">=": operator.ge, ">": operator.gt, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_OPPOSITE: Final = {">=": "<", ">": "<=", "<": ">=", "<=": ">"}


@dataclass(frozen=True, slots=True)
class Rule:
    """A threshold on a score column: keep the rows that satisfy it.

    Attributes
    ----------
    column : str
        The column that decides.
    op : {">=", ">", "<", "<="}
        Keep where ``column op threshold``; NaN and null are never kept.
    threshold : float
        The number compared with.
    status : str
        Status of the rows that are dropped.
    """

    column: str
    op: str
    threshold: float
    status: str

    def __post_init__(self) -> None:
        if self.op not in _OPERATORS:
            raise ConfigError(f"rule on {self.column}: op={self.op!r} is none of {', '.join(_OPERATORS)}")
        number = isinstance(self.threshold, numbers.Real) and not isinstance(self.threshold, bool)
        if not number or self.threshold != self.threshold:
            raise ConfigError(f"rule on {self.column}: threshold={self.threshold!r} should be a number")

    keeps_missing: ClassVar[bool] = False

    @property
    def words(self) -> str:
        """The rule in words: ``aesthetic_score >= 0.5``."""
        return f"{self.column} {self.op} {self.threshold:g}"

    def check_type(self, type_: pa.DataType | None) -> None:
        """Raise ConfigError if a column of this type cannot be decided by; None if it is not known."""
        if type_ is not None and not holds_numbers(type_):
            raise ConfigError(f"the column {self.column!r} does not hold numbers, but {type_}")

    def keeps(self, values: Any) -> Any:
        """Return the mask of the values that are kept."""
        return _OPERATORS[self.op](values, self.threshold)

    def reason(self, value: float) -> str:
        """Say why `value` was dropped: ``aesthetic_score 0.41 < 0.50``; whole numbers as such: ``width 96 < 256``.

        NaN stands for what is missing too: Parquet files do not tell them apart.
        """
        if value != value:
            return f"{self.column} is missing or not a number"
        if isinstance(value, int) and (isinstance(self.threshold, int) or float(self.threshold).is_integer()):
            return f"{self.column} {int(value)} {_OPPOSITE[self.op]} {int(self.threshold)}"
        for digits in range(2, 9):
            got, limit = f"{value:.{digits}f}", f"{self.threshold:.{digits}f}"
            if got != limit and float(limit) == round(self.threshold, 9):
                break
        return f"{self.column} {got} {_OPPOSITE[self.op]} {limit}"


@dataclass(frozen=True, slots=True)
class ValueRule:
    """Values of a column: keep the rows that have one of them, or those that have none.

    Attributes
    ----------
    column : str
        The column that decides; it holds text, whole numbers or booleans. They are compared as text.
    values : sequence of str, int or bool; or str
        The values; or a file with them, see :func:`imgcurate.value_lists.value_list`.
    status : str
        Status of the rows that are dropped.
    among : bool
        Keep rows whose value is among these; false: those whose value is not, and those without a value.
    sha256 : str, optional
        Checksum that the file should have.
    """

    column: str
    values: Sequence[str | int | bool] | str
    status: str
    among: bool = True
    sha256: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.values, str):
            if not self.values:
                raise ConfigError(f"rule on {self.column}: the name of the list is empty")
            return
        if not isinstance(self.values, (list, tuple)) or not self.values:
            raise ConfigError(f"rule on {self.column}: values={self.values!r} should be some values, or a file of them")
        if wrong := [v for v in self.values if not isinstance(v, (str, numbers.Integral))]:
            raise ConfigError(f"rule on {self.column}: {wrong[0]!r} should be text, a whole number, true or false")
        object.__setattr__(self, "values", tuple(self.values))

    @property
    def keeps_missing(self) -> bool:
        """Whether rows without a value are kept."""
        return not self.among

    @property
    def words(self) -> str:
        """The rule in words: ``license in 'cc0', 'cc-by'``, ``url not in optout.txt``."""
        return f"{self.column} {'in' if self.among else 'not in'} {self._list}"

    @property
    def _list(self) -> str:
        if isinstance(self.values, str):
            return printable(self.values.rstrip("/").rpartition("/")[2])
        shown = ", ".join(_shown(v) for v in self.values[:_FEW])
        return f"{shown} and {len(self.values) - _FEW} more" if len(self.values) > _FEW else shown

    def check_type(self, type_: pa.DataType | None) -> None:
        """Raise ConfigError if a column of this type cannot be decided by; None if it is not known."""
        if type_ is None:
            return
        if not any(is_(type_) for is_ in _VALUES):
            raise ConfigError(f"the column {self.column!r} should hold text, whole numbers or booleans, not {type_}")
        booleans = [v for v in self.values if isinstance(v, bool)]
        if booleans and not pa.types.is_boolean(type_):
            raise ConfigError(
                f"the column {self.column!r} holds {type_}, which is never {booleans[0]}: if text such as 'no' was "
                "meant, YAML reads that as a boolean unless it stands in quotes"
            )

    def keeps(self, values: Any) -> npt.NDArray[np.bool_]:
        """Return the mask of the values that are kept.

        Raises
        ------
        InputError, StorageError
            If the list cannot be read.
        """
        texts = as_texts(values)
        if isinstance(self.values, str):
            found = value_list(self.values, self.column, self.sha256).contains(texts)
        else:
            known = {str(v).lower() if isinstance(v, bool) else str(v) for v in self.values}
            found = np.fromiter((text in known for text in texts), bool, len(texts))
        return found if self.among else ~found

    def reason(self, value: Any) -> str:
        """Say why `value` was dropped: ``license 'nc' is not in 'cc0', 'cc-by'``, ``url 'http://a' is in out.txt``."""
        if value != value:
            return f"{self.column} is missing"
        return f"{self.column} {_shown(value)} is {'not in' if self.among else 'in'} {self._list}"


AnyRule: TypeAlias = Rule | ValueRule


def holds_numbers(type_: pa.DataType) -> bool:
    """Return whether the values of a type can be compared with a number."""
    return any(is_(type_) for is_ in _NUMBERS)


def rule_of(recorded: Mapping[str, Any]) -> AnyRule:
    """Return a rule as a manifest tells it."""
    return ValueRule(**recorded) if "values" in recorded else Rule(**recorded)


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else str(value).lower()
    text = printable(text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}...")
    return f"'{text}'" if isinstance(value, str) else text
