"""Self-speculation: the first recursions of a model draft tokens, and its full depth says which of them stay.

A request whose text is all in but its newest token goes on in a fork of its sequence, a token at a time at a small
depth. Then its own sequence takes in the newest token and the drafted ones together, as deep as the request's own
policy sends them. They stay up to the first that is refused, in whose place the full depth draws another. Texts are
distributed as without drafts, and the likeliest tokens are the very same: algorithm 1 of Leviathan et al. 2023
(arXiv 2211.17192).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from morex.cache.store import KVStore
from morex.depth.policy import Depth, DepthPolicy
from morex.infer.passes import Segment
from morex.infer.request import Draft, Params, Request
from morex.model.lm import LanguageModel
from morex.model.sampling import distribution, draw, is_integer, uniforms

MOST = 16
"""Tokens drafted at a time, at most."""


def check_draft(model: LanguageModel, params: Params) -> None:
    """Raises ValueError where the model cannot draft as a request asks."""
    draft, depth, recursions = params.draft, params.draft_depth, model.config.schedule.recursions
    if draft is None:
        if depth != 1:
            raise ValueError(f"draft_depth {depth!r} has no effect without draft, such as draft=4; set both")
        return
    if not is_integer(draft) or not 1 <= draft <= MOST:
        raise ValueError(f"draft {draft!r} must be an integer from 1 to {MOST}, the tokens drafted at a time")
    if recursions == 1:
        raise ValueError(f"draft {draft!r} is for models of several recursions, and this one has 1; leave it out")
    if not is_integer(depth) or not 1 <= depth < recursions:
        raise ValueError(
            f"draft_depth {depth!r} must be an integer from 1 to {recursions - 1}, below the model's {recursions} "
            "recursions"
        )
    model.policy(depth_of(params), None)


def depth_of(params: Params) -> Depth:
    """The depth at which a request drafts."""
    return f"uniform:{params.draft_depth}"


def text_of(request: Request, drafted: list[int]) -> Sequence[int]:
    """The text up to some drafted tokens, if the request's draws depend on it."""
    return request.tokens + drafted if request.params.repetition_penalty != 1 else ()


class Speculation:
    """Drafts of requests, in the store that their sequences are in."""

    def __init__(self, store: KVStore, policy_of: Callable[[Depth], DepthPolicy]) -> None:
        self.store, self.policy_of = store, policy_of

    def segment(self, request: Request) -> Segment:
        """What a request with one token to go sends in next: that or a drafted one, or all of them to be verified."""
        assert request.sequence is not None
        start, newest = self.store.tokens(request.sequence), request.tokens[-1]
        if request.draft is None:
            request.draft = Draft(self.store.fork(request.sequence))
        draft = request.draft
        if draft.sequence is not None:
            token = draft.tokens[-1] if draft.tokens else newest
            policy = self.policy_of(depth_of(request.params))
            return Segment(draft.sequence, start + len(draft.tokens), [token], policy, request)
        tokens = [newest, *draft.tokens]
        policy = self.policy_of(request.params.depth)
        return Segment(request.sequence, start, tokens, policy, request, len(tokens), request.trace)

    def extend(self, requests: Sequence[Request], logits: Tensor, generators: Sequence[torch.Generator]) -> list[bool]:
        """Draws the next token of each draft from its logits [B, V]; whether there was one to draw."""
        drafts = [request.draft for request in requests if request.draft is not None]
        texts = [text_of(request, draft.tokens) for request, draft in zip(requests, drafts, strict=True)]
        odds = distribution(logits, [request.params for request in requests], texts)
        tokens = draw(odds, generators).tolist()
        for request, draft, token, own in zip(requests, drafts, tokens, odds, strict=True):
            draft.tokens.append(token)
            draft.odds.append(own)
            if len(draft.tokens) == request.num_drafts or request.ends_at(token):
                self._free(draft)
        return [token >= 0 for token in tokens]

    def verify(
        self, requests: Sequence[Request], logits: Tensor, generators: Sequence[torch.Generator]
    ) -> list[list[int]]:
        """Ends the drafts of requests and truncates their sequences to the text that stays, its newest token left out.

        Args:
            logits: after the newest token and each drafted one, of one request after another [n, V].

        Returns:
            The new tokens of each: drafted ones that stay, and one more, which is -1 where logits leave nothing to
            choose.
        """
        drafts = [request.draft for request in requests if request.draft is not None]
        owners: list[Request] = []
        texts: list[Sequence[int]] = []
        for request, draft in zip(requests, drafts, strict=True):
            owners += [request] * (1 + len(draft.tokens))
            texts += [text_of(request, draft.tokens[:i]) for i in range(1 + len(draft.tokens))]
        odds = distribution(logits, [request.params for request in owners], texts)
        found = []
        parts = odds.split([1 + len(draft.tokens) for draft in drafts])
        for request, draft, own, generator in zip(requests, drafts, parts, generators, strict=True):
            tokens = verified(own, draft, generator)
            assert request.sequence is not None
            kept = request.num_tokens + len(tokens) - 1
            self.store.truncate(request.sequence, kept)
            if request.trace is not None:
                request.trace.begin(kept, 0)
            request.draft = None
            request.drafted += len(draft.tokens)
            request.accepted += len(tokens) - 1
            request.draws += 1 + 2 * len(draft.tokens)
            found.append(tokens)
        return found

    def drop(self, request: Request) -> None:
        """Forgets a draft, if there is one."""
        if request.draft is not None:
            self._free(request.draft)
            request.draft = None

    def _free(self, draft: Draft) -> None:
        if draft.sequence is not None:
            sequence, draft.sequence = draft.sequence, None
            self.store.free(sequence)


def verified(odds: Tensor, draft: Draft, generator: torch.Generator) -> list[int]:
    """The drafted tokens that stay and one more, -1 where there is none.

    Args:
        odds: of the full depth [1 + n, V], before each of the n drafted tokens and after the last.
        generator: from which 1 + n numbers are taken, whatever stays.
    """
    tokens = torch.tensor(draft.tokens, device=odds.device)
    uniform = uniforms([generator] * len(draft.tokens)).to(odds.device)
    if not odds.any(-1).all():
        return [-1]
    drafted = torch.stack(draft.odds)
    asked, offered = (part.gather(1, tokens[:, None]).squeeze(1) for part in (odds[:-1], drafted))
    stays = int((uniform * offered < asked).long().cumprod(0).sum())
    rest = odds[stays]
    if stays < len(draft.tokens):
        missing = (rest - drafted[stays]).clamp(min=0)
        # Where rounding alone has refused the token, nothing is missing.
        rest = missing if missing.any() else rest
    return draft.tokens[:stays] + draw(rest[None], [generator]).tolist()
