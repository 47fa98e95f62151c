"""The `method` section of a recipe: one class a method, with that method's own settings.

`method: scratch` is short for `method: {name: scratch}`. The methods themselves are in
`lrc.methods`.
"""

from typing import Annotated, Literal

from pydantic import Field

from lrc.sections import Section


class LrcSection(Section):
    """Low-Rank Clone; its settings are in `student`, `initialise` and `objective`."""

    name: Literal["lrc"]


class ScratchSection(Section):
    """A random student of the same shape, trained on LM + KL."""

    name: Literal["scratch"]


MethodSection = Annotated[LrcSection | ScratchSection, Field(discriminator="name")]

METHOD_SECTIONS: dict[str, type[Section]] = {"lrc": LrcSection, "scratch": ScratchSection}
