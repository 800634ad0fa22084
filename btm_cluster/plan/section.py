"""The base of all sections of a plan: frozen, closed to unknown keys, and checked
by their rules together with their fields."""

from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ModelWrapValidatorHandler, model_validator

from btm_cluster.plan import broken_rules


class Section(BaseModel):
    """A part of the plan: frozen, and closed to unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        protected_namespaces=(),
        allow_inf_nan=False,
        defer_build=True,  # most processes never read a plan
    )
    rules: ClassVar[broken_rules.Rules] = broken_rules.no_rules

    @model_validator(mode="wrap")
    @classmethod
    def _check(cls, given: Any, validate: ModelWrapValidatorHandler[Self]) -> Self:
        # Not a validator after the fields: pydantic skips those while a field is wrong, and all problems are
        # shown at once.
        return broken_rules.check_section(cls, given, validate, cls.rules)
