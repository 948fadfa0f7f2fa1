"""Speculative decoding: a drafter guesses a request's next tokens, and the model reads all of them in one pass.

The rows [last token, d1, ..., dk] of a request go through the model together, and a token is sampled behind each.
Random numbers are keyed by seed and position, so that is the token which plain decoding would sample there. Drafts are
accepted as long as they are what was sampled; the first sampled token that differs is the request's next one. So the
text is what it would be without drafts, greedy or sampled, but where rounding decides between two tokens, and its
distribution is the same.

What has been accepted is handed out one token a step, so that a request may end at any of them. Keys and values of
refused drafts are written over. A recurrent state cannot be wound back: it is saved before every pass and put back
where a draft is refused, and then the accepted tokens are fed once more with the next pass, which costs a few rows
instead of a pass.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from gfxlm.engine.drafters import Drafter
from gfxlm.engine.prefill import Fed, PrefillStep
from gfxlm.engine.request import Choice, Request, TokenSampler, choices
from gfxlm.engine.snapshots import Snapshots
from gfxlm.errors import UserError
from gfxlm.kernels.batch import Span
from gfxlm.models.base import CausalLM
from gfxlm.nn.cache import Cache

# A request whose drafts are wrong time and again decodes plainly meanwhile: 0, 1, 3, 7 steps, and so many at most.
_LONGEST_REST = 31


class Speculation:
    """An engine's passes over last tokens and drafts."""

    def __init__(
        self, drafter: Drafter, model: CausalLM, cache: Cache, sampler: TokenSampler, prefill_step: PrefillStep
    ) -> None:
        self._drafter, self._model, self._cache = drafter, model, cache
        self._sampler, self._prefill_step = sampler, prefill_step
        self._snapshots = Snapshots(cache)

    @staticmethod
    def rows(drafter: Drafter) -> int:
        """The most rows that a request has in a pass: tokens are fed once more until they would double it."""
        return 2 * (drafter.num_tokens + 1)

    def plan(self, requests: Sequence[Request]) -> dict[Request, Sequence[int]]:
        """The drafts of all of these that decode, or nothing where plain decoding does as well."""
        most = {request.slot: 0 if request.rest else self._room(request) for request in requests}
        for request in requests:
            request.rest = max(0, request.rest - 1)
        drafts = self._drafter.draft({slot: count for slot, count in most.items() if count > 0})
        plan = {request: drafts.get(request.slot, ()) for request in requests}
        for request, tokens in plan.items():
            positions = self._cache.lengths[request.slot] + len(request.pending) + len(tokens)
            if tokens and not self._cache.reserve(request.slot, positions):
                plan[request] = ()
        return plan if any(plan.values()) or any(request.replay for request in requests) else {}

    def verify(self, plan: Mapping[Request, Sequence[int]]) -> None:
        """One pass over the last tokens and drafts of requests; each then has one or more tokens to hand out.

        A cache is left with what plain decoding would have in it when the first of them is known.
        """
        for request, drafts in plan.items():
            if drafts:
                self._snapshots.save(request.slot)
        fed = [[*request.pending, *drafts] for request, drafts in plan.items()]
        slots = [request.slot for request in plan]
        rows = self._prefill_step.run([token for tokens in fed for token in tokens], slots, [len(x) for x in fed])
        sampled = self._one_by_one(rows, plan) if self._sampler.sequential else self._at_once(rows, plan)
        for (request, drafts), found in zip(plan.items(), sampled, strict=True):
            request.queue.extend(found)
            self._count(request, len(drafts), sum(choice.from_draft for choice in found))
            request.replay = 0
            self._cache.lengths[request.slot] -= len(drafts)
            if len(found) <= len(drafts):
                self.take_back(request)

    @staticmethod
    def _count(request: Request, drafted: int, accepted: int) -> None:
        request.drafted += drafted
        request.accepted += accepted
        if accepted:
            request.misses = 0
        elif drafted:
            request.rest = min((1 << request.misses) - 1, _LONGEST_REST)
            request.misses += 1

    def take_back(self, request: Request) -> None:
        """Undo what the recurrent states took in beyond the tokens that were handed out."""
        if not request.replay:
            request.replay = self._snapshots.put_back(request.slot)

    def _room(self, request: Request) -> int:
        """How many drafts a request may have: its context and the number of its tokens have limits."""
        if request.replay and len(request.pending) + self._drafter.num_tokens > self.rows(self._drafter):
            return 0  # without drafts, all is taken in for good
        if request.params.grammar is not None:
            return 0  # which tokens it allows behind a draft is not on the device
        room = self._cache.max_context - self._cache.lengths[request.slot] - len(request.pending)
        limit = request.params.max_tokens
        return room if limit < 0 else min(room, limit - len(request.tokens) - 1)

    def _at_once(self, fed: Fed, plan: Mapping[Request, Sequence[int]]) -> list[list[Choice]]:
        """Sample behind every row, then keep what holds."""
        rows = [row for span, drafts in zip(fed.spans, plan.values(), strict=True) for row in _drafted(span, drafts)]
        sampled = iter(self._sample(fed, rows))
        found = []
        for drafts in plan.values():
            behind = [next(sampled) for _ in range(len(drafts) + 1)]
            pairs = zip(behind, drafts, strict=False)
            right = sum(1 for _ in takewhile(lambda pair: pair[0].token == pair[1], pairs))
            found.append([replace(choice, from_draft=i < right) for i, choice in enumerate(behind[: right + 1])])
        return found

    def _one_by_one(self, fed: Fed, plan: Mapping[Request, Sequence[int]]) -> list[list[Choice]]:
        """Sample behind a row only when all before it are accepted: the sampler remembers what it has put out."""
        ways = [(list(_drafted(*way)), way[1]) for way in zip(fed.spans, plan.values(), strict=True)]
        found: list[list[Choice]] = [[] for _ in ways]
        alive, depth = list(range(len(ways))), 0
        while alive:
            sampled = self._sample(fed, [ways[i][0][depth] for i in alive])
            for i, choice in zip(alive, sampled, strict=True):
                drafts = ways[i][1]
                right = depth < len(drafts) and choice.token == drafts[depth]
                found[i].append(replace(choice, from_draft=right))
            alive, depth = [i for i in alive if found[i][-1].from_draft], depth + 1
        return found

    def _sample(self, fed: Fed, rows: Sequence[int]) -> list[Choice]:
        """What follows some rows, as if nothing had been drafted."""
        hidden, positions, slots = fed.at(rows)
        return choices(self._sampler.sample(self._model.logits(hidden), slots, positions))


def check_drafts(cache: Cache, *, batch_invariant: bool) -> None:
    """Raise UserError for what does not go together with drafts."""
    if cache.ring is not None:
        raise UserError(
            "max_kv_size: a cache that forgets cannot take back a draft_model's or a prompt look-up's drafts"
        )
    if batch_invariant:
        raise UserError("batch_invariant: passes over drafts have as many rows as there are drafts")


def _drafted(span: Span, drafts: Sequence[int]) -> range:
    """The rows of a sequence's last token and of its drafts."""
    return range(span.stop - len(drafts) - 1, span.stop)
