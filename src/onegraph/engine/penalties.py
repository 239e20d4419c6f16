"""Presence, frequency and repetition penalties on the tokens that stand in a prompt or output.

Takes: sequences and, at each step, their rows of logits. Gives: the logits after the penalties. Keeps: one
entry for each (row, token) that occurs, with its count in the output, brought up to date by the tokens that
came since the last step; so a step costs as much as there are different tokens, not as the vocabulary is
large. `E` entries.
"""

from collections.abc import Sequence as Seq

import numpy as np
import torch
from torch import Tensor

from onegraph.engine.request import Sequence


class Penalties:
    """The penalties of `members`, which are the owners of these rows of the logits, on the device of these."""

    def __init__(self, members: Seq[Sequence], rows: Seq[int], device: torch.device) -> None:
        self._members = members
        self._rows = rows
        self._entry_of: list[dict[int, int]] = [{} for _ in members]  # token -> entry
        self._entries = np.zeros((3, 1024), dtype=np.int64)  # row, token, count in the output
        self._owner = np.zeros(1024, dtype=np.int64)  # member of an entry
        self._num_entries = 0
        self._num_seen = [m.num_prompt_tokens for m in members]
        for member, one in enumerate(members):
            for token in one.request.prompt_token_ids:
                self._entry(member, token)
        settings = [
            (m.params.presence_penalty, m.params.frequency_penalty, m.params.repetition_penalty) for m in members
        ]
        self._settings = torch.tensor(settings, dtype=torch.float32, device=device).T  # [3, members]

    def apply_(self, logits: Tensor) -> None:
        """Changes the rows in place, for all tokens that are there now: repetition, then frequency, then
        presence.
        """
        for member, one in enumerate(self._members):
            for token in one.token_ids[self._num_seen[member] :]:
                entry = self._entry(member, token)  # may make the arrays anew
                self._entries[2, entry] += 1
            self._num_seen[member] = len(one.token_ids)
        rows, tokens, counts = torch.from_numpy(self._entries[:, : self._num_entries]).to(logits.device)
        owner = torch.from_numpy(self._owner[: self._num_entries]).to(logits.device)
        presence, frequency, repetition = self._settings[:, owner]
        values = logits[rows, tokens]
        values = torch.where(values > 0, values / repetition, values * repetition)
        logits[rows, tokens] = values - frequency * counts - presence * (counts > 0)

    def _entry(self, member: int, token: int) -> int:
        """The entry of a member's token, made where it is new."""
        entries = self._entry_of[member]
        entry = entries.get(token)
        if entry is None:
            entry = self._num_entries
            if entry == len(self._owner):
                self._entries = np.concatenate((self._entries, np.zeros_like(self._entries)), axis=1)
                self._owner = np.concatenate((self._owner, np.zeros_like(self._owner)))
            self._entries[:, entry] = (self._rows[member], token, 0)
            self._owner[entry] = member
            entries[token] = entry
            self._num_entries += 1
        return entry
