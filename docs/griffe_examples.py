"""Griffe extension: shows `Example:` of docstrings as code, as it does `Examples:`."""

import re

import griffe


class ExampleSections(griffe.Extension):
    """Renames the section before Griffe parses the docstring."""

    def on_object(self, *, obj, **kwargs):
        """Is called with each module, class, function and attribute."""
        if obj.docstring:
            text = obj.docstring.value
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", text)
