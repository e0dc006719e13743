"""Which texts say nearly the same in nearly the same words."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from persona_axis.catalog.walk import Text


def words(text: str) -> list[str]:
    """Lower-case words, apostrophes inside."""
    return re.findall(r"\w+(?:'\w+)*", text.lower())


def five_grams(text: str) -> set[tuple[str, ...]]:
    """Runs of five words; a shorter text is one run of all its words."""
    found = words(text)
    return {tuple(found[i : i + 5]) for i in range(len(found) - 4)} or {tuple(found)}


def near_duplicates(texts: Sequence[Text], within: float, across: float) -> Iterator[tuple[Text, Text, float]]:
    """Texts too like an earlier one: (text, the first it is too like, how like).

    Alike is the Jaccard similarity of their five-grams, too much above `within` for texts of one owner and above
    `across` for others. An inverted index of five-grams finds the pairs that share one; no others are compared.
    """
    holders: dict[tuple[str, ...], list[int]] = defaultdict(list)
    sizes: list[int] = []
    for number, text in enumerate(texts):
        grams = five_grams(text.text)
        shared = Counter(other for gram in grams for other in holders[gram])
        for other, common in sorted(shared.items()):
            alike = common / (len(grams) + sizes[other] - common)
            if alike > (within if texts[other].owner == text.owner else across):
                yield text, texts[other], alike
                break
        sizes.append(len(grams))
        for gram in grams:
            holders[gram].append(number)
