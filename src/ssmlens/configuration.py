"""What every configuration here is: frozen, and closed to unknown keys, with the nearest name in the error."""

from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from ssmlens.errors import UserError, nearest


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def of(cls, values: dict[str, Any], what: str = "") -> Self:
        """Validate a mapping. Raises UserError that names the key, what is wrong with it, and the nearest known name."""
        what = what or cls.__name__
        try:
            return cls.model_validate(values)
        except ValidationError as e:
            raise UserError(f"{what}: " + "; ".join(_explain(cls, problem) for problem in e.errors())) from None


def _explain(cls: type[BaseModel], problem: Any) -> str:
    where = ".".join(str(p) for p in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = _fields_at(cls, problem["loc"][:-1])
        return f"unknown key {where!r}{nearest(str(problem['loc'][-1]), known)}" + (
            f" (known: {', '.join(sorted(known))})" if known else ""
        )
    if problem["type"] == "missing":
        return f"key {where!r} is missing"
    return f"{where or 'value'}: {problem['msg'].removeprefix('Value error, ')}"


def _fields_at(cls: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """The field names of the (possibly nested) model in which a key was unknown."""
    for part in path:
        field = cls.model_fields.get(str(part))
        inner = None if field is None else field.annotation
        candidates = [inner, *getattr(inner, "__args__", ())]
        models = [c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)]
        if not models:
            return list(cls.model_fields) if field is None else []
        cls = models[0]
    return list(cls.model_fields)
