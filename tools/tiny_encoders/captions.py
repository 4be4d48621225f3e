"""Captions for the embedded CLIP: its byte-pair vocabulary, and captions that are nearly right.

Byte-pair encoding is Sennrich et al., "Neural Machine Translation of Rare Words with Subword Units"
(arXiv:1508.07909), over bytes and with the end of a word marked `</w>`, as CLIP has it. Every text can be
spelt, and the words of the shapes world and the frequent words of the folder are tokens of their own.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from dit_jax.data.shapes_world import COLOURS, HELD_OUT, OUTLINES, PHRASINGS, RADII, RELATIONS, Object, Scene
from dit_jax.data.shapes_world import caption as sentence

END_OF_WORD = "</w>"
START_OF_TEXT, END_OF_TEXT = "<|startoftext|>", "<|endoftext|>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"

ATTRIBUTES = ("size", "colour", "shape")
EDITS = (*ATTRIBUTES, "relation", "swap colours", "swap shapes")


def write_tokenizer(texts: Iterable[str], num_tokens: int, length: int, output: Path) -> dict[str, int]:
    """Learns a vocabulary of `num_tokens` tokens from texts and writes the files of a CLIP tokenizer.

    As in CLIP's own: first all bytes, then all bytes at the end of a word, the merges in the order in which
    they were learnt, and last the start and the end of text.

    Returns:
      The vocabulary: token to id.
    """
    learner = Tokenizer(models.BPE(end_of_word_suffix=END_OF_WORD))
    learner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = list(bytes_to_unicode().values())
    letters = [*alphabet, *(letter + END_OF_WORD for letter in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=num_tokens, initial_alphabet=alphabet, end_of_word_suffix=END_OF_WORD, show_progress=False
    )
    learner.train_from_iterator(texts, trainer)
    merges = json.loads(learner.to_str())["model"]["merges"][: num_tokens - len(letters) - 2]
    vocabulary = [*letters, *("".join(pair) for pair in merges), START_OF_TEXT, END_OF_TEXT]
    ids = {token: i for i, token in enumerate(vocabulary)}

    output.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START_OF_TEXT, "eos_token": END_OF_TEXT, "unk_token": END_OF_TEXT, "pad_token": END_OF_TEXT}
    config = {**special, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "model_max_length": length}
    (output / "vocab.json").write_text(json.dumps(ids, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (output / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (output / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    (output / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return ids


def meaning(scene: Scene) -> str:
    """The caption of a scene without its phrasing: pictures with the same one have the same caption."""
    return sentence(scene.objects, scene.relation, "{}")


def wrong_caption(rng: np.random.Generator, scene: Scene, edits: Sequence[str] = EDITS) -> str:
    """A caption that differs from the scene in one point: an attribute, the relation, or which object has which.

    It never names a held-out combination of colour and shape. For scenes of one object `edits` must hold an attribute.
    """
    while True:
        objects, relation = _edited(rng, scene, edits)
        allowed = all((item.colour, item.shape) not in HELD_OUT for item in objects)
        if allowed and (_looks(objects), relation) != (_looks(scene.objects), scene.relation):
            return sentence(objects, relation, _choose(rng, PHRASINGS))


def _edited(rng: np.random.Generator, scene: Scene, edits: Sequence[str]) -> tuple[tuple[Object, ...], str | None]:
    """Objects and relation after one random edit, which may have changed nothing."""
    objects, relation = list(scene.objects), scene.relation
    edit = _choose(rng, edits if relation else [edit for edit in edits if edit in ATTRIBUTES])
    if edit == "relation":
        return scene.objects, _choose(rng, list(RELATIONS))
    if edit.startswith("swap"):
        part = edit.removeprefix("swap ").removesuffix("s")
        first, second = objects[:2]
        objects[0] = replace(first, **{part: getattr(second, part)})
        objects[1] = replace(second, **{part: getattr(first, part)})
    else:
        k = int(rng.integers(len(objects)))
        names = {"size": RADII, "colour": COLOURS, "shape": OUTLINES}[edit]
        objects[k] = replace(objects[k], **{edit: _choose(rng, list(names))})
    return tuple(objects), relation


def _looks(objects: Iterable[Object]) -> list[str]:
    return [item.phrase for item in objects]


def _choose(rng: np.random.Generator, choices: Sequence[str]) -> str:
    return choices[int(rng.integers(len(choices)))]
