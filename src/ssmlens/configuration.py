"""What every configuration here is: frozen, closed to unknown keys, and plain about its mistakes: they are UserErrors of one
line, with the nearest name for an unknown key."""

from collections.abc import Mapping
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, ValidationError, model_validator

from ssmlens.errors import UserError, nearest


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @model_validator(mode="wrap")
    @classmethod
    def _plain_errors(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        name = cls.__name__
        if isinstance(data, Mapping):
            known = list(cls.model_fields)
            for key in data:
                if key not in known:
                    raise UserError(f"{name} has no key {key!r}{nearest(str(key), known)} (it has {', '.join(known)})")
        try:
            return handler(data)
        except ValidationError as error:
            raise _plain(name, error) from None

    # A subclass's own validators of the whole run outside of the one above.
    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise _plain(type(self).__name__, error) from None

    @classmethod
    def of(cls, values: Mapping[str, Any], what: str) -> Self:
        """Validate a mapping; `what` it is (a file, say) begins the message of a UserError."""
        try:
            return cls.model_validate(values)
        except UserError as e:
            raise UserError(f"{what}: {e}") from None
        except ValidationError as error:
            raise UserError(f"{what}: {_plain(cls.__name__, error)}") from None


def _plain(name: str, error: ValidationError) -> UserError:
    return UserError(f"{name}: {'; '.join(map(_fault, error.errors()))}")


def _fault(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    return (f"{where}: " if where else "") + problem["msg"].removeprefix("Value error, ")
