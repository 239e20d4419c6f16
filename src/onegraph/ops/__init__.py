"""Ops of onegraph's own, as torch.library ops with fakes; importing this package registers them."""

from __future__ import annotations

from onegraph.ops import attention as attention
from onegraph.ops import grouped_linear as grouped_linear
from onegraph.ops import kv_cache as kv_cache
from onegraph.ops import largest as largest
from onegraph.ops import linear as linear
from onegraph.ops import rotary as rotary
