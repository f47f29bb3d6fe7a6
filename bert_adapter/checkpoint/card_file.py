"""What a model's card, README.md, declares of where the model comes from: its licence, and what it was made of."""

import warnings
from typing import Any

CARD = "README.md"
MARK = "<!-- written by bert_adapter -->"  # only cards with this line are ever replaced
KEPT = ("language", "license", "license_name", "license_link", "base_model")


def front_matter(content: bytes, name: Any = CARD) -> dict[str, Any]:
    """The entries between the lines of three dashes with which a card begins; none if it does not."""
    import yaml

    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        warnings.warn(f"{name}: letters that are not UTF-8 are not carried over: {error}", stacklevel=2)
        text = content.decode("utf-8-sig", "replace")
    begin, _, rest = text.replace("\r\n", "\n").partition("---\n")
    entries, end, _ = rest.partition("\n---")
    if begin.strip() or not end:
        return {}
    try:
        found = yaml.load(entries, yaml.BaseLoader)  # all are texts: Norwegian, "no", is not false
    except yaml.YAMLError as error:
        warnings.warn(f"{name}: licence and base model are not carried over: {error}", stacklevel=2)
        return {}
    return found if isinstance(found, dict) else {}


def provenance(content: bytes | None, name: Any = CARD) -> dict[str, Any]:
    """What a card declares of `KEPT`."""
    found = {} if content is None else front_matter(content, name)
    kept = {entry: found[entry] for entry in KEPT if found.get(entry)}
    if "://" not in (link := str(kept.get("license_link", "://"))):
        warnings.warn(f"{name}: license_link is not carried over, for {link} is not", stacklevel=2)
        kept.pop("license_link")
    return kept


def card(entries: dict[str, Any], text: str = "") -> bytes:
    """A card with these entries, and a text below them."""
    import yaml

    declared = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
    return f"---\n{declared}---\n\n{MARK}\n{text}".encode()
