"""The base class of every settings class, and number types that several of them share."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(gt=0, le=1)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Config(BaseModel):
    """A part of the plan. Unknown keys are refused, and a value never changes once it is read."""

    # Inputs are hidden in errors because a URL in a plan may hold credentials.
    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)
