"""An extension of Griffe: the section "Example:" of our docstrings is one of code, as "Examples:" is to Griffe."""

import re
from typing import Any

from griffe import Extension, Object


class Examples(Extension):
    def on_object(self, *, obj: Object, **more: Any) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub("^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
