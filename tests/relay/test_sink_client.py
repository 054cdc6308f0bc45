"""SinkClient: which sinks may be called in their pods, and which never."""

from pathlib import Path

import pytest

from weir.adaptor.endpoints import Access
from weir.adaptor.podset import Listed, PodSet
from weir.adaptor.sinks import SinkClient, Target
from weir.proxy.policy.balance import Revision

PODS = (Revision("", ("127.0.0.1:8012",)),)


async def past_its_url(url: str, access: Access, audience: str | None = None) -> bool:
    """With a resolver, and with the pods in `access`, if there are any."""
    target = Target.parse(url)
    found = []
    for resolver in (Listed(PODS), None):
        client = SinkClient(url, target, access, audience=audience, resolver=resolver)
        found.append(isinstance(client.http, PodSet))
        await client.close()
    assert found[1] <= bool(access.pods)
    return found[0]


async def test_a_plain_sink_is_called_in_its_pods() -> None:
    assert await past_its_url("http://fn/", Access())
    assert await past_its_url("http://fn/", Access(pods=PODS))


@pytest.mark.parametrize("pods", [(), PODS])
async def test_tls_tokens_and_audiences_end_at_the_url(
    tmp_path: Path, pods: tuple[Revision, ...]
) -> None:
    assert not await past_its_url("https://fn/", Access(pods=pods))
    assert not await past_its_url("http://fn/", Access(token=tmp_path / "token", pods=pods))
    assert not await past_its_url("http://fn/", Access(pods=pods), audience="fn.default")
