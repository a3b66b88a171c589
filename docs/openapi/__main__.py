"""Writes the documents into the folder of the files that the gateway serves."""

from docs.openapi.documents import files
from server.gateway.files import SITE


def main() -> None:
    """Writes every file."""
    for path, text in files().items():
        (SITE / path).parent.mkdir(exist_ok=True)
        (SITE / path).write_text(text)


if __name__ == "__main__":
    main()
