"""Types of the fields in JSON files that one command writes and another one reads."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from isic.runtime.errors import UserError
from isic.runtime.files import read_json

MAX_KEY = 80
"""Characters of a field's name in an error message."""


class Fields(BaseModel):
    """The fields of a JSON object that are read; it may have others."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


FieldsT = TypeVar("FieldsT", bound=Fields)


def read_fields(path: Path, fields: type[Fields], remedy: str) -> dict[str, Any]:
    """Read a JSON object and check the types of its fields.

    Args:
        remedy: end of the error message, such as "fit the ensemble again".

    Raises:
        UserError: the file is missing or no JSON object, or a field is missing or of another type.
    """
    value = read_json(path)
    check_fields(path, value, fields, remedy)
    return value


def check_fields(
    path: Path, value: Mapping[str, Any], fields: type[Fields], remedy: str
) -> None:
    """Raise a UserError if a field of a JSON object is missing or of another type."""
    try:
        fields.model_validate(value)
    except ValidationError as error:
        problem = error.errors()[0]
        key = ".".join(map(str, problem["loc"]))[:MAX_KEY]
        raise UserError(f"{path} is damaged: {key}: {problem['msg']}; {remedy}") from None
