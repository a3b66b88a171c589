"""Every error class of the ledger, and instances of them."""

from __future__ import annotations

import inspect

from server.ledger import errors
from server.ledger.errors import DaybookError

CLASSES = [each for each in vars(errors).values() if inspect.isclass(each) and issubclass(each, DaybookError)]
LEAVES = [each for each in CLASSES if not each.__subclasses__()]


def make(leaf: type[DaybookError]) -> DaybookError:
    """Returns an error of a class. Each text parameter has its own name as its value."""
    positional: list[str | float] = []
    named: dict[str, str] = {}
    for parameter in inspect.signature(leaf).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            named[parameter.name] = parameter.name
        else:
            positional.append(1.5 if parameter.annotation == "float" else parameter.name)
    return leaf(*positional, **named)  # type: ignore[arg-type]  # each class has other parameters
