"""The causal decoder on packed sequences. How slots see the earlier slots of their sequence is handed in."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recgpt_torchrec.config import Model
from recgpt_torchrec.data.inputs.spec import Feature
from recgpt_torchrec.data.segments import EXPOSED
from recgpt_torchrec.model.attention import Attention, Weighting
from recgpt_torchrec.model.dropout import dropout


class Block(nn.Module):
    """One decoder block: causal self-attention and feed-forward layer, each followed by dropout, residual and norm."""

    def __init__(self, config: Model) -> None:
        super().__init__()
        dim = config.dim
        self.heads, self.dropout, self.attention_dropout = config.heads, config.dropout, config.attention_dropout
        self.activation = F.relu if config.activation == "relu" else F.gelu
        # Attention divides by the square root of a head's width, however it is computed; queries make up the rest.
        self.query_scale = config.heads**-0.5 if config.attention_scale == "dim" else 1.0
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, config.feed_forward * dim), nn.Linear(config.feed_forward * dim, dim)

    def forward(self, x: Tensor, attention: Attention) -> Tensor:
        """[rows, row_length, dim] -> the same."""
        q, k, v = self.project(x)
        return self.finish(x, attention.attend(q, k, v, self.attention_dropout if self.training else 0.0))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, length, dim] -> queries, keys and values, [rows, heads, length, head_dim] each."""
        rows, length, _ = x.shape
        packed = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        if x.device.type == "cpu":  # one copy here instead of one per operand of every product
            packed = packed.contiguous()
        q, k, v = packed
        return q if self.query_scale == 1.0 else q * self.query_scale, k, v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Run the block from attention's result on: block input `x` [rows, length, dim] and `attended` [rows, heads,
        length, head_dim] -> block output [rows, length, dim]."""
        attended = self.out(attended.transpose(1, 2).reshape(x.shape))
        x = self.norm_attention(x + dropout(attended, self.dropout, self.training))
        return self.norm_feed(x + dropout(self.down(self.activation(self.up(x))), self.dropout, self.training))


class TokenFeatures(nn.ModuleDict):
    """The sum of the embeddings of a token's features, a table for each, by name.

    They start at 0, so that a model begins as one without; a run may start from one without a feature, or with fewer
    values of it (see `checkpoints.growing`).
    """

    def __init__(self, features: list[Feature], dim: int) -> None:
        super().__init__({each.name: nn.Embedding(each.values, dim) for each in features})
        for embedding in self.parameters():
            nn.init.zeros_(embedding)

    def forward(self, features: Tensor) -> Tensor:
        """[features, ...] int64, in the order of the list they were made of -> [..., dim]."""
        added = [embedding(values) for embedding, values in zip(self.values(), features.unbind(0), strict=True)]
        return torch.stack(added).sum(0)


class Refused(nn.Module):
    """How feedback (shown, disliked or skipped items) enters the decoder apart from what was chosen.

    What a user refused is no part of the means of his history. At the input it is added, with a factor of its kind, to
    the item chosen last, so that what follows is predicted as before it. Its item vectors have other factors in two
    means over feedback alone that are added to the output. Both fade at a learned rate with each choice after the
    feedback, one slowly and one fast: what is shown says where a user is, and what he refused since his last choice
    says what he does not want now. All factors start at 0, so that tuning starts near the pre-trained model and learns
    how feedback counts, from "alike" (above 0) to "rules out" (below).
    """

    def __init__(self, kinds: int) -> None:
        super().__init__()
        self.at_input, self.at_output = nn.Parameter(torch.zeros(kinds)), nn.Parameter(torch.zeros(2, kinds))
        self.fading = nn.Parameter(torch.tensor([0.3, 3.0]))

    AT_ONCE = 50.0
    """Rate at which a mean fades that holds the newest choice alone."""
    STEP_IN, STEP_OUT = 20.0, 100.0
    """Factors are their parameters times this. Adam moves a parameter by the learning rate per step, however many
    weights share the work; without, a factor of -5 would take thousands of steps."""
    PRIOR = 1.0
    """Added to the number of refusals by which their sum is divided: one alone counts half of many alike."""

    def inputs(self, items: Tensor, newest: Tensor, segment: Tensor) -> Tensor:
        """Item vectors at the input, [..., dim], given those of the entries and of the newest choices up to them."""
        factors = self._spread(self.at_input * self.STEP_IN, 1.0)[segment][..., None]
        return items * factors + newest * (segment >= EXPOSED)[..., None]

    def outputs(self, segment: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each mean that is added to the output: factors of the item vectors [..., 1] by their segment ids [...]
        int64, and the rate [] at which it fades."""
        factors = [self._spread(each * self.STEP_OUT, 0.0)[segment][..., None] for each in self.at_output]
        return list(zip(factors, self.fading.abs(), strict=True))

    def _spread(self, own: Tensor, chosen: float) -> Tensor:
        return torch.cat([own.new_full((EXPOSED,), chosen), own])

    def weightings(self, segment: Tensor) -> tuple[Weighting, Weighting]:
        """Those of the means of what was chosen and of what was refused; `segment` is [rows, row_length]."""
        chosen = (segment < EXPOSED).float()
        clock = chosen.cumsum(-1)
        return Weighting(chosen, clock), Weighting(1 - chosen, clock, self.PRIOR)


class Decoder(nn.Module):
    """h0 = item + user + position (+ segment), N causal blocks (paper, equations 2 and 3), and two means of the
    history.

    Both means are causal low-pass filters of the item vectors, which attention alone learns badly from sparse logs: a
    linear map of the running mean is added to the input, and a mean that decays at a learned rate to the output.
    """

    def __init__(
        self, config: Model, segments: int = 0, features: list[Feature] | None = None, feedback: bool = False
    ) -> None:
        """
        Args:
            config: of the decoder.
            segments: number of segment ids that it tells apart; 0: it reads none.
            features: of tokens; None: it reads none.
            feedback: whether feedback enters apart from what was chosen, where it reads segments.
        """
        super().__init__()
        self.config, self.segments = config, segments
        self.position = nn.Embedding(config.max_len, config.dim)
        self.norm_in = nn.LayerNorm(config.dim) if config.norm_in else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.apply(self._init)
        if config.history_in:
            self.mean_in = nn.Linear(config.dim, config.dim, bias=False)
            nn.init.eye_(self.mean_in.weight)
        if segments:  # zeros, so that prompt-tuning starts from the pre-trained model
            self.segment = nn.Embedding(segments, config.dim)
            nn.init.zeros_(self.segment.weight)
        self.refused = Refused(segments - EXPOSED) if feedback and segments else None
        if features:
            self.features = TokenFeatures(features, config.dim)
        if config.history_out:
            self.mean_out, self.forgetting = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(0.5))
        self.map_out: nn.Module = nn.Identity()
        if config.output_map:
            self.map_out = nn.Linear(config.dim, config.dim, bias=False)
            nn.init.eye_(self.map_out.weight)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(
        self,
        items: Tensor,
        users: Tensor,
        position: Tensor,
        segment: Tensor,
        attention: Attention,
        features: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder.

        Args:
            items: [rows, row_length, dim] item vectors of the slots.
            users: [rows, row_length, dim] user vectors, already regularised.
            position, segment: [rows, row_length] int64, as in `SequenceBatch`.
            attention: of the batch's sequences.
            features: [features, rows, row_length] int64; None: the model reads none.

        Returns:
            [rows, row_length, dim] outputs; the next item is scored by the inner product of output and item vector.
        """
        chosen, refused = (None, None) if self.refused is None else self.refused.weightings(segment)
        mean = attention.mean(items, None, chosen) if self.config.history_in else None
        inputs = items
        if self.refused is not None:
            at_once = items.new_full((), self.refused.AT_ONCE)  # a copy of a number of Python would wait for the device
            inputs = self.refused.inputs(items, attention.mean(items, at_once, chosen), segment)
        x = self.embed(inputs, users, position, segment, mean, features)
        for block in self.blocks:
            x = block(x, attention)
        if self.config.history_out:
            x = x + self.mean_out * attention.mean(items, self.forgetting.abs(), chosen)
        if self.refused is not None:
            for factors, fading in self.refused.outputs(segment):
                x = x + attention.mean(items * factors, fading, refused)
        return self.map_out(x)

    def embed(
        self,
        items: Tensor,
        users: Tensor,
        position: Tensor,
        segment: Tensor,
        mean: Tensor | None,
        features: Tensor | None = None,
    ) -> Tensor:
        """The first block's input, [..., dim]; `mean` is the plain mean of the history's item vectors, or None, and
        `features` [features, ...] are those of the tokens."""
        x = items + users + self.position(position)
        if self.segments:
            x = x + self.segment(segment)
        if features is not None:
            x = x + self.features(features)
        if mean is not None:
            x = x + self.mean_in(mean)
        return dropout(self.norm_in(x), self.config.dropout, self.training)
