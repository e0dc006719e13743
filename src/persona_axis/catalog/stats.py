"""How much a catalog holds, in all and by group and category."""

from collections import Counter
from dataclasses import asdict, dataclass

from persona_axis.catalog.catalog import Catalog
from persona_axis.catalog.validate import start_shares
from persona_axis.catalog.walk import walk


@dataclass(frozen=True, slots=True)
class CatalogStats:
    """Counts of texts; `same_start_share` is the share of system prompts (of roles and of both trait poles) that
    the most frequent three words begin, `ten_starts_share` that of the ten most frequent together."""

    roles: int
    role_prompts: int
    role_questions: int
    rubrics: int
    traits: int
    trait_prompt_pairs: int
    trait_questions: int
    questions: int
    default_prompts: int
    user_personas: int
    topics: int
    openings: int
    scripts: int
    probes: int
    harm_categories: int
    harm_probes: int
    exemplars: int
    same_start_share: float
    ten_starts_share: float
    by_group: dict[str, dict[str, int]]  # what is counted -> group or category -> how many

    def to_dict(self) -> dict:
        return asdict(self)


def catalog_stats(catalog: Catalog) -> CatalogStats:
    """Count a catalog. CatalogError if a file is broken."""
    texts = walk(catalog)
    kinds = Counter((text.owner.partition(" ")[0], text.kind) for text in texts)
    totals = Counter(text.kind for text in texts)
    most, ten = start_shares([text.text for text in texts if text.kind == "prompt"])
    return CatalogStats(
        roles=len(catalog.role_names),
        role_prompts=kinds["role", "prompt"],
        role_questions=kinds["role", "question"],
        rubrics=kinds["role", "criteria"],
        traits=len(catalog.trait_names),
        trait_prompt_pairs=kinds["trait", "prompt"] // 2,
        trait_questions=kinds["trait", "question"],
        questions=totals["shared_question"],
        default_prompts=totals["default_prompt"],
        user_personas=len(catalog.users),
        topics=totals["topic"],
        openings=totals["opening"],
        scripts=len(catalog.scripts),
        probes=totals["probe"],
        harm_categories=len(catalog.harm_categories),
        harm_probes=totals["harm_probe"],
        exemplars=totals["reply"],
        same_start_share=most,
        ten_starts_share=ten,
        by_group=_by_group(catalog),
    )


def _by_group(catalog: Catalog) -> dict[str, dict[str, int]]:
    counts = {
        "roles": {group: len(names) for group, names in catalog.groups.items()},
        "traits": {group: len(names) for group, names in catalog.trait_groups.items()},
        "questions": dict(Counter(question.category for question in catalog.questions)),
        "topics": dict(Counter(user.domain for user in catalog.users for _ in user.topics)),
        "probes": dict(Counter(probe.category for probe in catalog.probes)),
        "exemplars": {f"{e.set}/{e.name}": len(e.replies) for e in catalog.exemplars},
    }
    return {what: groups for what, groups in counts.items() if groups}
