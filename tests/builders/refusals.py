"""What a refused call says."""

import pytest

from mixadv.errors import UserError


def refusal(call, *args, error=UserError, **kwargs):
    """The message with which call(*args, **kwargs) is refused: one line."""
    with pytest.raises(error) as refused:
        call(*args, **kwargs)
    message = str(refused.value)
    assert "\n" not in message, message
    return message
