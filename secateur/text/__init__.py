"""A learning task for text that a plan can name: no code of the user's is needed.

`NextToken` is next-token prediction on texts, prompts with completions, or token arrays.
"""

from __future__ import annotations

from secateur.text.next_token import NextToken

__all__ = ["NextToken"]
