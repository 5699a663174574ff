"""Types of the fields in files that one command writes and another one reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from isic.runtime.errors import UserError
from isic.runtime.files import read_json

MAX_KEY = 80
"""Characters of a field's name in an error message."""

FileName = Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=255)]
Count = Annotated[int, Field(ge=1, lt=2**31)]
Index = Annotated[int, Field(ge=0, lt=2**31)]
Share = Annotated[float, Field(ge=0)]
"""A weight or a pAUC: not negative, and finite as every number in `Fields`."""


class Fields(BaseModel):
    """The fields of a JSON object that are read; it may have others."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def read_fields(path: Path, fields: type[Fields], remedy: str) -> dict[str, Any]:
    """Read a JSON object and check its fields.

    Args:
        remedy: end of the error message, such as "fit the ensemble again".

    Raises:
        UserError: it is missing or no JSON object, or a field is missing or of another type.
    """
    value = read_json(path)
    check_fields(path, value, fields, remedy)
    return value


def check_fields(path: Path, value: Mapping[str, Any], fields: type[Fields], remedy: str) -> None:
    """Raise a UserError if a field is missing or of another type; `remedy` as for `read_fields`."""
    try:
        fields.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))[:MAX_KEY]
        reason = problem["msg"].removeprefix("Value error, ")
        where = f"{key}: " if key else ""
        raise UserError(f"{path} is damaged ({where}{reason}); {remedy}") from None
