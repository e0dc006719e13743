"""The sets that studies and evaluations use: drift users and scripts, probes, harm categories, exemplars.

Each is optional in a user's catalog folder: what is missing is empty.
"""

from pathlib import Path
from typing import Any

from persona_axis.catalog.fields import (
    check_different,
    check_keys,
    check_name,
    check_tables,
    check_text,
    check_texts,
    grouped_files,
    read_tables,
    read_toml,
)
from persona_axis.catalog.parse import parse_questions
from persona_axis.catalog.texts import Exemplars, HarmCategory, Question, Script, Topic, User
from persona_axis.errors import CatalogError


def read_users(folder: Path) -> tuple[User, ...]:
    """``drift/users/<domain>/<user>.toml``, by domain and name. CatalogError if one breaks the format, or two
    topics of a domain share an id."""
    users = [_user(*item) for item in grouped_files(folder / "drift" / "users")]
    for domain in sorted({user.domain for user in users}):
        topics = [topic.id for user in users if user.domain == domain for topic in user.topics]
        check_different(f"{folder}/drift/users/{domain}", "id", topics)
    return tuple(users)


def read_scripts(folder: Path, users: tuple[User, ...]) -> tuple[Script, ...]:
    """``drift/scripts/<domain>/<topic>.toml``. CatalogError if one breaks the format, names a user or topic
    that is not there, or does not begin with the topic's opening."""
    topics = {(user.domain, user.name, topic.id): topic for user in users for topic in user.topics}
    scripts = []
    for path, domain, name in grouped_files(folder / "drift" / "scripts"):
        table = check_keys(str(path), read_toml(path), ("user", "topic", "messages"))
        script = Script(
            domain=domain,
            user=check_name(str(path), "user", table["user"]),
            topic=check_name(str(path), "topic", table["topic"]),
            messages=check_texts(str(path), "messages", table["messages"]),
        )
        topic = topics.get((domain, script.user, script.topic))
        if topic is None or script.topic != name:
            raise CatalogError(
                f"{path}: a script is called after its topic, and drift/users/{domain}/{script.user}.toml must "
                f"have a topic {script.topic!r}"
            )
        if script.messages[0] != topic.opening:
            raise CatalogError(f"{path}: the first message is not the opening of topic {script.topic!r}")
        scripts.append(script)
    return tuple(scripts)


def read_probes(folder: Path) -> tuple[Question, ...]:
    """``probes.toml``: introspective questions, ``[[probe]]`` tables with id, category and text."""
    path = folder / "probes.toml"
    return parse_questions(path, "probe") if path.exists() else ()


def read_harm_categories(folder: Path) -> tuple[HarmCategory, ...]:
    """``harm.toml``: ``[[category]]`` tables with name, definition and probes."""
    path = folder / "harm.toml"
    if not path.exists():
        return ()
    found = []
    for where, item in read_tables(path, "category"):
        table = check_keys(where, item, ("name", "definition", "probes"))
        found.append(
            HarmCategory(
                name=check_name(where, "name", table["name"]),
                definition=check_text(where, "definition", table["definition"]),
                probes=check_texts(where, "probes", table["probes"]),
            )
        )
    check_different(str(path), "name", [category.name for category in found])
    return tuple(found)


def read_exemplars(folder: Path) -> tuple[Exemplars, ...]:
    """``exemplars/<set>/<class>.toml``: description and replies."""
    found = []
    for path, group, name in grouped_files(folder / "exemplars"):
        table = check_keys(str(path), read_toml(path), ("description", "replies"))
        description = check_text(str(path), "description", table["description"])
        found.append(Exemplars(group, name, description, check_texts(str(path), "replies", table["replies"])))
    return tuple(found)


def _user(path: Path, domain: str, name: str) -> User:
    table = check_keys(str(path), read_toml(path), ("persona", "topic"))
    topics = [_topic(*item) for item in check_tables(str(path), "topic", table["topic"])]
    return User(name, domain, check_text(str(path), "persona", table["persona"]), tuple(topics))


def _topic(where: str, item: Any) -> Topic:
    table = check_keys(where, item, ("id", "topic", "opening"))
    return Topic(
        id=check_name(where, "id", table["id"]),
        text=check_text(where, "topic", table["topic"]),
        opening=check_text(where, "opening", table["opening"]),
    )
