"""The comparison job: one composition made with several methods."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, field_validator, model_validator

from studio.composition.region_schema import REGIONAL_METHODS, RegionFields
from studio.composition.schema import ComposeConfig


class CompareConfig(ComposeConfig):
    """One picture per method, everything else the same: the seed, the adapters, the prompts."""

    kind: ClassVar[str] = "compare"

    methods: list[str] = Field(description="Methods to compare, in order. Those without regions ignore them.")

    @field_validator("methods")
    @classmethod
    def _some(cls, names: list[str]) -> list[str]:
        if not names:
            raise ValueError("name at least one method")
        if len(set(names)) != len(names):
            raise ValueError("a method is named twice")
        return names

    @model_validator(mode="after")
    def _regions_are_used(self) -> CompareConfig:
        regional = [name for name in self.methods if name in REGIONAL_METHODS]
        if regional and not self.regions:
            raise ValueError(f"'{regional[0]}' needs regions: give some, or leave the method out")
        return self

    def of(self, method: str) -> ComposeConfig:
        """The composition with one of the methods."""
        values: dict[str, Any] = self.model_dump(mode="json", exclude={"methods"})
        if method not in REGIONAL_METHODS:
            values = {name: value for name, value in values.items() if name not in RegionFields.model_fields}
        return ComposeConfig.parse({**values, "method": method, "images": 1}, source=f"the method {method}")
