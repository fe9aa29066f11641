"""Plain texts of Wikipedia articles, by its API: one request at a time, with an address to complain to."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

from vlmclassifier.records import UserError, first_line

SERVER = "https://en.wikipedia.org/w/api.php"
USER_AGENT = "vlmclassifier (research; {contact})"
PAUSE = 0.5  # seconds between two requests
ATTEMPTS = 4


def download_articles(
    titles: Sequence[str], contact: str, server: str = SERVER, pause: float = PAUSE
) -> Iterator[tuple[str, dict[str, Any] | Exception]]:
    """Yield (title, {"title", "text"} or exception) for every article; the text is None where there is none.

    `contact`: an e-mail address or a web page, which Wikipedia's rules ask for. Waits as long as the server says.
    Raises UserError without a contact.
    """
    if not contact:
        raise UserError("Wikipedia asks for a contact in the requests: give --contact YOUR@ADDRESS.")
    import requests

    with requests.Session() as session:
        session.headers["User-Agent"] = USER_AGENT.format(contact=contact)
        for title in titles:
            try:
                yield title, _download(session, title, server, pause)
            except (requests.RequestException, ValueError, KeyError) as error:
                yield title, RuntimeError(f"{title}: {first_line(error)}")
            time.sleep(pause)


def _download(session: Any, title: str, server: str, pause: float) -> dict[str, Any]:
    parameters = {"action": "query", "prop": "extracts", "explaintext": 1, "redirects": 1, "format": "json",
                  "formatversion": 2, "maxlag": 5, "titles": title}  # fmt: skip
    for attempt in range(ATTEMPTS):
        response = session.get(server, params=parameters, timeout=60)
        is_busy = response.status_code in (429, 503) or "maxlag" in response.headers.get("MediaWiki-API-Error", "")
        if not is_busy or attempt == ATTEMPTS - 1:
            break
        time.sleep(min(60.0, float(response.headers.get("Retry-After", 4 * pause))))
    response.raise_for_status()
    page = response.json()["query"]["pages"][0]
    return {"title": page["title"], "text": page.get("extract") or None}
