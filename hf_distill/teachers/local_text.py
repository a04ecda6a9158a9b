"""A text teacher that is a transformers model in this process: it writes, and it tells log-probabilities of labels."""

from __future__ import annotations

import contextlib
import copy
import inspect
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList, Pipeline, StoppingCriteriaList
from trl import prepare_multimodal_messages

from hf_distill.heads import base_model_of, is_encoder_decoder
from hf_distill.signals import upcast
from hf_distill.teachers.cache.fingerprint import tokenizer_fingerprint, weights_digest
from hf_distill.teachers.cache.keys import image_digest
from hf_distill.teachers.decoding import Draw, StopAtStrings, left_padded
from hf_distill.teachers.frozen import FrozenTeacher, eval_mode
from hf_distill.teachers.generations import Generation, Request
from hf_distill.teachers.text import Prompt, TextTeacher, checked_prompts
from hf_distill.training import compat


class LocalTextTeacher(TextTeacher):
    """A causal language model, or a vision-language model, of transformers in this process.

    What it writes depends on the request alone, not on which requests meet in a batch, up to rounding: padding changes
    log-probabilities by a few 1e-6 in float32 and 1e-2 in bfloat16, which can turn a near tie between two tokens.
    Settings of the checkpoint's generation config other than its end of sequence (top_k, repetition penalty…) are not
    applied.

    Args:
        model: a model, a transformers pipeline, a FrozenTeacher, or a Hub id / folder, which is put on this process's
            accelerator. It is read in eval mode and otherwise left as it is.
        tokenizer: tokenizer or processor; None takes the pipeline's, the teacher's or the checkpoint's.
        batch_size: texts written, or prompts judged, at once.
        store: see TextTeacher. The weights, dtype, tokenizer and chat template are the teacher's fingerprint.
        options: for a Hub id, to `FrozenTeacher.from_pretrained` (revision, dtype, load_in_4bit…).

    Raises:
        ValueError: no tokenizer, an encoder-decoder, a store of another teacher.

    Example:
        >>> teacher = LocalTextTeacher("Qwen/Qwen2.5-7B-Instruct", store="texts")  # doctest: +SKIP
        >>> question = [{"role": "user", "content": "Name a bird."}]  # doctest: +SKIP
        >>> teacher.generate([question], num_return_sequences=4, max_new_tokens=8)[0].text  # doctest: +SKIP
        >>> teacher.label_log_probs([question], ["Owl", "Cat"], normalize=True).exp()  # doctest: +SKIP
    """

    def __init__(self, model, tokenizer=None, *, batch_size: int = 16, store=None, **options):
        self.model, self.processor = _model_and_processor(model, tokenizer, options)
        self._tokenizer = getattr(self.processor, "tokenizer", self.processor)
        self.base = base_model_of(self.model)
        if self._tokenizer is None or not hasattr(self._tokenizer, "get_vocab"):
            raise ValueError(f"{type(self.base).__name__} came without a tokenizer: pass tokenizer=")
        if is_encoder_decoder(self.base) or not self.base.can_generate():
            raise ValueError(f"a text teacher must be a causal language model, got {type(self.base).__name__}")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.batch_size = batch_size
        self.vocabulary: int | None = None  # ids from here on are never written
        self.name = getattr(self.base.config, "_name_or_path", "") or type(self.base).__name__
        self.context = getattr(self.base.config.get_text_config(), "max_position_embeddings", None)
        self._pictures: dict[str, object] = {}  # of the present call, by digest
        self._parameters = inspect.signature(self.base.forward).parameters
        super().__init__(store)

    @property
    def tokenizer(self):
        return self.processor

    @property
    def config(self):
        return self.base.config

    def fingerprint(self) -> dict:
        return {
            "kind": "local",
            "weights": weights_digest(self.model),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            **tokenizer_fingerprint(self.processor),
        }

    # ---- writing -----------------------------------------------------------------------------------------------------
    def generate(self, prompts: Sequence[Prompt], *, images: Sequence | None = None, **settings) -> list[Generation]:
        """As TextTeacher's, and of pictures.

        Args:
            images: per prompt an image or a list of images, for a processor. Prompts are then conversations; where they
                name no places ({"type": "image"}), pictures stand before the first question.

        Raises:
            ValueError: as TextTeacher's; images without a processor, or of texts.
        """
        if images is None:
            return super().generate(prompts, **settings)
        self._check_images(prompts, images)
        if any(isinstance(prompt, str) for prompt in prompts):
            raise ValueError("prompts with images must be conversations: [{'role': 'user', 'content': text}]")
        shown = [self._shown(prompt, image) for prompt, image in zip(prompts, images, strict=True)]
        try:
            return super().generate(shown, **settings)
        finally:
            self._pictures = {}

    def _shown(self, conversation: list[dict], images) -> list[dict]:
        """The conversation with a digest at each picture's place, so that other pictures are other requests."""
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        shown = []
        for message in prepare_multimodal_messages(conversation, images=images):
            content = []
            for part in message["content"]:
                if part.get("type") == "image":
                    digest = image_digest(part["image"])
                    self._pictures[digest] = part["image"]
                    part = {"type": "image", "digest": digest}
                content.append(part)
            shown.append(message | {"content": content})
        return shown

    def answer(self, requests: list[Request]) -> Iterator[list[tuple[int, Generation]]]:
        asked, room = [request.prompt for request in requests], requests[0].max_new_tokens
        if self._pictures:
            order = list(range(len(requests)))
        else:
            ids = self._token_ids(asked, room)
            order = sorted(range(len(requests)), key=lambda i: -len(ids[i]))  # longest first: memory fails early
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            if self._pictures:
                pictures = [
                    [
                        self._pictures[part["digest"]]
                        for message in asked[i]
                        for part in message["content"]
                        if "digest" in part
                    ]
                    for i in batch
                ]
                inputs = self._image_inputs([asked[i] for i in batch], pictures, room)
            else:
                inputs = left_padded([ids[i] for i in batch], self._padding, self.base.device)
            yield list(zip(batch, self._write(inputs, [requests[i] for i in batch]), strict=True))

    @torch.no_grad()
    def _write(self, inputs: dict[str, Tensor], requests: list[Request]) -> list[Generation]:
        first, device = requests[0], self.base.device
        width, prompts = inputs["input_ids"].shape[1], inputs["attention_mask"].sum(-1).tolist()
        draw = Draw(requests, width, device, self.vocabulary)
        stop = StopAtStrings(self._tokenizer, first.stop_strings, width) if first.stop_strings else None
        with self._speaking(), self._plain_generation():
            sequences = self.base.generate(
                **inputs,
                max_new_tokens=first.max_new_tokens,
                logits_processor=LogitsProcessorList([draw]),
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
            )
        log_probs = torch.stack(draw.log_probs, 1).tolist() if first.log_probs else None
        stopped = {} if stop is None else stop.length
        return [
            self._generation(ids, prompts[row], stopped.get(row), first, log_probs and log_probs[row])
            for row, ids in enumerate(sequences[:, width:].tolist())
        ]

    def _generation(self, ids: list[int], prompt: int, stopped: int | None, request: Request, log_probs) -> Generation:
        """Of a row of new tokens, padded after its end."""
        ends = [i + 1 for i, token in enumerate(ids) if token in self._ends][:1] + ([stopped] if stopped else [])
        ids = ids[: min(ends, default=len(ids))]
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        cuts = [at for s in request.stop_strings if (at := text.find(s)) >= 0]
        return Generation(
            text=text[: min(cuts, default=len(text))],
            finish_reason="stop" if ends else "length",
            prompt_tokens=prompt,
            completion_tokens=len(ids),
            token_ids=ids,
            log_probs=None if log_probs is None else log_probs[: len(ids)],
        )

    # ---- judging -----------------------------------------------------------------------------------------------------
    def label_log_probs(
        self,
        prompts: Sequence[Prompt],
        labels: Sequence[str],
        *,
        images: Sequence | None = None,
        normalize: bool = False,
    ) -> Tensor:
        """Exact log-probabilities of each label as what follows each prompt, without generating.

        The prompt runs once for all labels; labels of several tokens go on from its cache. A label is tokenised alone
        and nothing is added to its end: of two labels where one begins with the other, the longer is never likelier.

        Args:
            prompts: as in `generate`.
            images: per prompt an image or a list of images, for a processor; the prompts name their places.
            normalize: over the labels of each prompt, so that their probabilities sum to 1.

        Returns:
            (N, L) on the CPU, float32 (float64 of a float64 model).

        Raises:
            ValueError: prompts as in `generate`; labels that are no tokens, or the same tokens.
        """
        prompts, label_ids = checked_prompts(prompts), self._label_ids(labels)
        longest = max(map(len, label_ids))
        if images is None:
            ids = self._token_ids(prompts, longest)
            order = sorted(range(len(prompts)), key=lambda i: -len(ids[i]))
        else:
            self._check_images(prompts, images)
            order = list(range(len(prompts)))
        rows: list[Tensor | None] = [None] * len(prompts)
        with tqdm(total=len(order), desc=f"{self.name} judges", unit="prompt", disable=None) as progress:
            for start in range(0, len(order), self.batch_size):
                batch = order[start : start + self.batch_size]
                if images is None:
                    inputs = left_padded([ids[i] for i in batch], self._padding, self.base.device)
                else:
                    inputs = self._image_inputs([prompts[i] for i in batch], [images[i] for i in batch], longest)
                for i, row in zip(batch, self._score(inputs, label_ids, images is None).cpu(), strict=True):
                    rows[i] = row
                self.usage.requests += len(batch)
                self.usage.prompt_tokens += int(inputs["attention_mask"].sum())
                progress.update(len(batch))
        out = torch.stack(rows)
        return out.log_softmax(-1) if normalize else out

    @torch.no_grad()
    def _score(self, inputs: dict, labels: list[list[int]], plain: bool) -> Tensor:
        """(B, L); `plain` inputs are text alone, whose positions are counted here."""
        mask, several = inputs["attention_mask"], any(len(ids) > 1 for ids in labels)
        positions = plain and "position_ids" in self._parameters

        def run(tokens: dict, mask: Tensor, **options):
            place = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens["input_ids"].shape[1] :]}
            return self.base(**tokens, attention_mask=mask, **(place if positions else {}), **options)

        with self._speaking():
            keep = {"logits_to_keep": 1} if "logits_to_keep" in self._parameters else {}
            prefix = run({k: v for k, v in inputs.items() if k != "attention_mask"}, mask, use_cache=several, **keep)
            first = upcast(prefix.logits[:, -1]).log_softmax(-1)
            columns = []
            for ids in labels:
                column = first[:, ids[0]]
                if len(ids) > 1:
                    tokens = torch.tensor(ids, device=mask.device)
                    read = tokens[:-1].expand(len(mask), -1)
                    out = run(
                        {"input_ids": read}, torch.cat([mask, torch.ones_like(read)], 1), use_cache=True,
                        past_key_values=copy.deepcopy(prefix.past_key_values),
                    )  # fmt: skip
                    rest = upcast(out.logits).log_softmax(-1)
                    column = column + rest[:, torch.arange(len(ids) - 1), tokens[1:]].sum(-1)
                columns.append(column)
        return torch.stack(columns, -1)

    def _label_ids(self, labels: Sequence[str]) -> list[list[int]]:
        if isinstance(labels, str) or not len(labels):
            raise ValueError(f"labels must be a list of texts, got {labels!r}")
        ids = [self._tokenizer(label, add_special_tokens=False)["input_ids"] for label in labels]
        seen: dict[tuple, str] = {}
        for label, tokens in zip(labels, ids, strict=True):
            if not tokens:
                raise ValueError(f"label {label!r} is no token of {self.name}: give it some text")
            if tuple(tokens) in seen:
                raise ValueError(
                    f"labels {seen[tuple(tokens)]!r} and {label!r} are the same tokens to {self.name}: give other words"
                )
            seen[tuple(tokens)] = label
        return ids

    # ---- prompts -----------------------------------------------------------------------------------------------------
    def _render(self, conversation: list[dict]) -> str:
        if not getattr(self.processor, "chat_template", None):
            raise ValueError(
                f"{self.name} has no chat template, so it cannot read conversations: give plain texts, use an "
                "instruction-tuned model, or set tokenizer.chat_template"
            )
        return self.processor.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)

    def _token_ids(self, prompts: Sequence[Prompt], room: int) -> list[list[int]]:
        """Tokens of each prompt, checked to leave room for as many more."""
        out = []
        for i, prompt in enumerate(prompts):
            plain = isinstance(prompt, str)
            if not plain and isinstance(prompt[0], int):
                ids = list(prompt)
            else:
                ids = self._tokenizer(prompt if plain else self._render(prompt), add_special_tokens=plain)["input_ids"]
            if not ids:
                raise ValueError(f"prompt {i} is no token of {self.name}: {prompt!r}")
            self._check_room(len(ids), room, f"prompt {i}")
            out.append(ids)
        return out

    def _check_room(self, length: int, room: int, what: str) -> None:
        if self.context is not None and length + room > self.context:
            raise ValueError(
                f"{what} has {length} tokens, with {room} more it would exceed the {self.context} positions of "
                f"{self.name}: shorten it, or lower max_new_tokens"
            )

    def _check_images(self, prompts: Sequence[Prompt], images: Sequence) -> None:
        if self.processor is self._tokenizer:
            raise ValueError(
                f"{self.name} was given images but has no processor to read them: pass tokenizer=processor"
            )
        if len(images) != len(prompts):
            raise ValueError(f"images must be one entry per prompt, got {len(images)} for {len(prompts)} prompts")
        if len({isinstance(prompt, str) for prompt in prompts}) > 1:
            raise ValueError("prompts with images must be all texts or all conversations")

    def _image_inputs(self, prompts: list[Prompt], images: list, room: int) -> dict:
        plain = isinstance(prompts[0], str)
        tokenizer, before = self._tokenizer, (self._tokenizer.padding_side, self._tokenizer.pad_token)
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(self._padding)
        try:
            inputs = self.processor(
                text=list(prompts) if plain else [self._render(prompt) for prompt in prompts],
                images=[list(image) if isinstance(image, (list, tuple)) else [image] for image in images],
                add_special_tokens=plain,
                padding=True,
                return_tensors="pt",
            )
        finally:
            tokenizer.padding_side, tokenizer.pad_token = before
        self._check_room(int(inputs["attention_mask"].sum(-1).max()), room, "a prompt with its images")
        dtype = self.base.dtype
        return {k: v.to(self.base.device, dtype if v.is_floating_point() else None) for k, v in inputs.items()}

    # ---- the model ---------------------------------------------------------------------------------------------------
    @property
    def _ends(self) -> list[int]:
        """Tokens that end a text."""
        ends = getattr(self.base.generation_config, "eos_token_id", None)
        ends = self._tokenizer.eos_token_id if ends is None else ends
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    @property
    def _padding(self) -> int:
        """Masked everywhere, so any token will do."""
        padding = self._tokenizer.pad_token_id
        return padding if padding is not None else (self._ends or [0])[0]

    @contextlib.contextmanager
    def _speaking(self) -> Iterator[None]:
        with torch.autocast(self.base.device.type, enabled=False), eval_mode(self.model):
            yield

    @contextlib.contextmanager
    def _plain_generation(self) -> Iterator[None]:
        """Without the checkpoint's own generation settings, which `generate` would add to those it is given."""
        own = self.base.generation_config
        self.base.generation_config = GenerationConfig(eos_token_id=self._ends or None, pad_token_id=self._padding)
        try:
            yield
        finally:
            self.base.generation_config = own


def _model_and_processor(model, processor, options: dict) -> tuple[nn.Module, object]:
    if isinstance(model, (str, os.PathLike)):
        teacher = FrozenTeacher.from_pretrained(os.fspath(model), **options)
        placed = getattr(teacher.model, "hf_device_map", None) or getattr(teacher.model, "is_quantized", False)
        if not placed and torch.accelerator.is_available():
            kind = torch.accelerator.current_accelerator().type
            teacher.model.to(torch.device(kind, int(os.environ.get("LOCAL_RANK", 0))))
        return teacher.model, processor or teacher.tokenizer
    if options:
        raise ValueError(f"{', '.join(options)} are for loading a Hub id or folder, and a model was passed")
    if isinstance(model, Pipeline):
        return model.model, processor or getattr(model, "processor", None) or model.tokenizer
    if isinstance(model, FrozenTeacher):
        return model.model, processor or model.tokenizer
    if isinstance(model, nn.Module):
        path = getattr(model.config, "_name_or_path", "")
        return model, processor or (compat.load_processing_class(path) if path else None)
    raise TypeError(f"model must be a model, pipeline, FrozenTeacher, Hub id or folder, got {type(model).__name__}")


__all__ = ["LocalTextTeacher"]
