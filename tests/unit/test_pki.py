"""Keys and certificates: derived the same for ever, and others accept what is meant alone."""

from __future__ import annotations

import base64
import datetime
import functools
import hashlib
import hmac
import random

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from nodeagent import secrets
from nodeagent.adapters.pki import LocalPki
from nodeagent.errors import HostError, Secret
from tests.unit.fakes import NOW

PKI = LocalPki()
DAY = 86400.0
SEED = Secret(base64.b64encode(bytes(range(32))).decode())
OTHER = Secret(base64.b64encode(bytes(range(1, 33))).decode())
AUTHORITY, OTHER_AUTHORITY = PKI.authority(SEED, NOW), PKI.authority(OTHER, NOW)
NAMES = ("server.dc1.consul", "server11.server.dc1.consul")
WORKER = ("worker.dc1.consul",)


def issue(names: tuple[str, ...] = NAMES, lifetime_s: float = 30 * DAY, now: float = NOW) -> str:
    return PKI.issue(SEED, AUTHORITY, names, lifetime_s, now).reveal()


# -- what derives from a seed


def hkdf(seed: Secret, info: str, size_bytes: int) -> bytes:
    """RFC 5869 by hand, without a salt."""
    key = hmac.digest(bytes(32), base64.b64decode(seed.reveal()), "sha256")
    found, block = b"", b""
    for number in range(1, size_bytes // 32 + 2):
        block = hmac.digest(key, block + info.encode() + bytes([number]), "sha256")
        found += block
    return found[:size_bytes]


@pytest.mark.parametrize("size_bytes", [4, 16, 32, 48])
@pytest.mark.parametrize("purpose", ["gossip", "ca", "server token", "generation", "Zürich"])
def test_derivation_is_that_of_rfc_5869(purpose: str, size_bytes: int) -> None:
    found = PKI.derive(SEED, purpose, size_bytes)
    assert found == hkdf(SEED, f"nodeagent 1 {purpose}", size_bytes)
    assert found == PKI.derive(SEED, purpose, size_bytes)


def test_what_is_for_one_purpose_says_nothing_about_another() -> None:
    purposes = ("gossip", "ca", "server token", "enrolment token", "generation", "gossip ", "")
    found = [PKI.derive(seed, purpose) for seed in (SEED, OTHER) for purpose in purposes]
    assert len(set(found)) == len(found)


def test_a_cluster_finds_its_keys_again_with_every_later_version() -> None:
    """Another value here is another key on every node of every cluster there is."""
    kept = secrets.ServerSecrets(SEED, (AUTHORITY,), {})
    keys = secrets.keys(kept, PKI)
    assert keys.server_token is not None
    assert {
        "gossip": keys.gossip[0].reveal(),
        "enrolment": keys.enrolment.reveal(),
        "server": keys.server_token.reveal(),
        "generation": keys.generation,
        "ca": public_key_digest(AUTHORITY),
    } == {
        "gossip": "+lDiIbBYBCuQ9mXswiAmcI/ThIOgN6TYglT/gGMFNJk=",
        "enrolment": "a4292d07-1f76-a274-efce-cd789fa19f25",
        "server": "82f69275-72ae-192a-24b4-686052684607",
        "generation": "7695354f",
        "ca": "8348c5edaa7b5592ba7319268b50142f509ae403a050e6cbde35cd548987eec1",
    }


def public_key_digest(pem: str) -> str:
    key = x509.load_pem_x509_certificate(pem.encode()).public_key()
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    return hashlib.sha256(key.public_bytes(serialization.Encoding.DER, form)).hexdigest()


def test_a_new_seed_is_32_bytes_and_another_each_time() -> None:
    seeds = {PKI.seed().reveal() for _ in range(8)}
    assert len(seeds) == 8
    assert {len(base64.b64decode(seed, validate=True)) for seed in seeds} == {32}


# -- certificates, as an independent verifier sees them (RFC 5280 and the CA/Browser Forum's rules)


def certificate(pem: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(pem.encode())


def accepted(
    pem: str,
    *,
    authority: str = AUTHORITY,
    name: str = NAMES[0],
    at: float = NOW,
    through: tuple[x509.Certificate, ...] = (),
) -> bool:
    """Whether a client that trusts `authority` accepts this certificate as that of `name`."""
    policy = (
        verification.PolicyBuilder()
        .store(verification.Store([certificate(authority)]))
        .time(datetime.datetime.fromtimestamp(at, datetime.timezone.utc))
    )
    try:
        policy.build_server_verifier(x509.DNSName(name)).verify(certificate(pem), list(through))
    except verification.VerificationError:
        return False
    return True


def accepted_as_client(pem: str, *, authority: str = AUTHORITY) -> bool:
    policy = (
        verification.PolicyBuilder()
        .store(verification.Store([certificate(authority)]))
        .time(datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc))
    )
    try:
        policy.build_client_verifier().verify(certificate(pem), [])
    except verification.VerificationError:
        return False
    return True


def test_a_servers_certificate_is_accepted_under_its_names_alone() -> None:
    pem = issue()
    assert all(accepted(pem, name=name) for name in NAMES)
    for name in ("server12.server.dc1.consul", "server.dc2.consul", "dc1.consul", *WORKER):
        assert not accepted(pem, name=name), name
    assert accepted_as_client(pem)
    assert PKI.certificates(pem)[0].names == NAMES


def test_a_workers_certificate_is_refused_as_a_servers() -> None:
    pem = issue(WORKER)
    assert accepted_as_client(pem)
    assert not accepted(pem, name=WORKER[0]), "it may only be shown by clients"
    assert not accepted(pem)


def test_a_workers_certificate_under_a_servers_second_name_is_refused_all_the_same() -> None:
    pem = issue((*WORKER, *NAMES))
    assert not any(accepted(pem, name=name) for name in (*WORKER, *NAMES))


def test_another_clusters_ca_is_another_ca_although_it_has_the_same_name() -> None:
    pem = issue()
    assert certificate(AUTHORITY).subject == certificate(OTHER_AUTHORITY).subject
    assert not accepted(pem, authority=OTHER_AUTHORITY)
    assert not accepted_as_client(pem, authority=OTHER_AUTHORITY)
    assert PKI.is_signed(pem, AUTHORITY)
    assert not PKI.is_signed(pem, OTHER_AUTHORITY)


def test_two_cas_of_one_name_are_told_apart_by_their_identifiers() -> None:
    """OpenSSL, with both to trust, otherwise takes the first and finds the signature wrong."""
    kind = x509.AuthorityKeyIdentifier
    found = certificate(issue()).extensions.get_extension_for_class(kind).value.key_identifier
    identifiers = [
        certificate(each).extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        for each in (AUTHORITY, OTHER_AUTHORITY)
    ]
    assert found == identifiers[0] != identifiers[1]


def test_nobody_makes_certificates_with_one_of_the_cas() -> None:
    """Neither a server's certificate nor a CA below the CA can sign another."""
    authority = certificate(AUTHORITY)
    number = int.from_bytes(hkdf(SEED, "nodeagent 1 ca", 48), "big")
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
    ca_key = ec.derive_private_key(number % (order - 1) + 1, ec.SECP256R1())
    assert ca_key.public_key() == authority.public_key(), "or this test says nothing"
    key = ec.generate_private_key(ec.SECP256R1())
    below = (
        base(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "below")]), authority, key)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), False
        )
        .add_extension(usage_of(authority), True)
        .sign(ca_key, hashes.SHA256())
    )
    forged = leaf_by(below, key)
    assert accepted(forged, authority=pem_of(below)), "it is a good certificate but for its CA"
    assert not accepted(forged, through=(below,))
    server = issue()
    server_key = serialization.load_pem_private_key(server.encode(), None)
    assert isinstance(server_key, ec.EllipticCurvePrivateKey)
    assert not accepted(leaf_by(certificate(server), server_key), through=(certificate(server),))


def base(
    subject: x509.Name, issuer: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> x509.CertificateBuilder:
    day = datetime.timedelta(days=1)
    now = datetime.datetime.fromtimestamp(NOW, datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject)
        .public_key(key.public_key())
        .serial_number(7)
        .not_valid_before(now - day)
        .not_valid_after(now + day)
    )


def usage_of(authority: x509.Certificate) -> x509.KeyUsage:
    return authority.extensions.get_extension_for_class(x509.KeyUsage).value


def leaf_by(issuer: x509.Certificate, issuer_key: ec.EllipticCurvePrivateKey) -> str:
    """A server's certificate by that issuer, as right as it can be."""
    public = issuer_key.public_key()
    real = certificate(issue())
    made = base(real.subject, issuer, ec.generate_private_key(ec.SECP256R1()))
    for extension in real.extensions:
        if not isinstance(extension.value, x509.AuthorityKeyIdentifier):
            made = made.add_extension(extension.value, extension.critical)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(public)
    return pem_of(made.add_extension(identifier, False).sign(issuer_key, hashes.SHA256()))


def pem_of(made: x509.Certificate) -> str:
    return made.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("at", "is_good"),
    [
        pytest.param(NOW - 3601, False, id="more-than-an-hour-before"),
        pytest.param(NOW - 3599, True, id="on-a-machine-an-hour-behind"),
        pytest.param(NOW + 30 * DAY - 1, True, id="to-its-last-second"),
        pytest.param(NOW + 30 * DAY + 1, False, id="not-afterwards"),
    ],
)
def test_a_certificate_is_good_for_its_lifetime_and_an_hour_before(
    at: float, is_good: bool
) -> None:
    assert accepted(issue(), at=at) == is_good


def test_no_certificate_outlives_its_ca() -> None:
    [ca] = PKI.certificates(AUTHORITY)
    assert ca.not_after == NOW + 20 * 365 * DAY
    late = issue(now=ca.not_after - DAY)
    assert PKI.certificates(late)[0].not_after == ca.not_after
    assert PKI.certificates(issue())[0].not_after == NOW + 30 * DAY


def test_every_certificate_has_a_key_of_its_own() -> None:
    first, second = issue(), issue()
    assert public_key_digest(first) != public_key_digest(second)
    assert certificate(first).serial_number != certificate(second).serial_number
    key = serialization.load_pem_private_key(first.encode(), None)
    assert key.public_key() == certificate(first).public_key()


def test_a_ca_belongs_to_its_seed_whenever_its_certificate_was_made() -> None:
    again = PKI.authority(SEED, NOW + DAY)
    assert PKI.matches(SEED, AUTHORITY)
    assert PKI.matches(SEED, again)
    assert not PKI.matches(OTHER, AUTHORITY)
    assert accepted(issue(), authority=again, at=NOW + DAY)


def test_a_certificate_is_not_signed_by_a_certificate_that_is_no_ca() -> None:
    server = issue()
    key = serialization.load_pem_private_key(server.encode(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert not PKI.is_signed(leaf_by(certificate(server), key), AUTHORITY)


@pytest.mark.parametrize(
    "pem",
    [
        "",
        "junk",
        "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        issue().split("-----END CERTIFICATE-----")[0],
        issue().partition("-----END CERTIFICATE-----\n")[2],
    ],
    ids=["empty", "junk", "frame-around-nothing", "cut-in-the-middle", "the-key-alone"],
)
def test_what_is_no_certificate_is_an_error_that_shows_nothing_of_it(pem: str) -> None:
    with pytest.raises(HostError) as caught:
        PKI.certificates(pem)
    assert str(caught.value) == "could not read a certificate: it is not one in PEM form"


@pytest.mark.filterwarnings("ignore:Parsed a serial number")  # it comes to that too
def test_a_certificate_that_was_damaged_anywhere_is_read_or_is_that_same_error() -> None:
    """Nothing else escapes, whatever it is compared with afterwards."""
    chance, refused = random.Random(2016), 0
    raw = certificate(AUTHORITY).public_bytes(serialization.Encoding.DER)
    for number in range(2000):
        damaged = bytearray(raw)
        # The version's number, which the library reads late, is one byte of some 400.
        damaged[chance.randrange(len(raw)) if number % 20 else raw.index(b"\xa0\x03") + 4] ^= (
            1 << chance.randrange(8)
        )
        text = base64.encodebytes(bytes(damaged)).decode()
        pem = f"-----BEGIN CERTIFICATE-----\n{text}-----END CERTIFICATE-----\n"
        try:
            PKI.certificates(pem)
        except HostError:
            refused += 1
        else:
            PKI.is_signed(issue_once(), pem)
            PKI.is_signed(pem, AUTHORITY)
            PKI.matches(SEED, pem)
    assert refused > 200


@functools.cache
def issue_once() -> str:
    return issue()


# -- what is sealed for the servers


@pytest.mark.parametrize("text", ["", "token", "Zürich → 東京 \0", "x" * 10_000])
def test_who_has_the_cas_seed_reads_what_is_sealed_for_it(text: str) -> None:
    first, second = (PKI.seal(AUTHORITY, Secret(text)) for _ in range(2))
    assert first != second, "nobody sees that two are the same"
    for sealed in (first, second):
        assert PKI.unseal(SEED, sealed) == Secret(text)
        assert PKI.unseal(OTHER, sealed) is None


def test_what_was_altered_anywhere_is_refused() -> None:
    raw = base64.b64decode(PKI.seal(AUTHORITY, Secret("token")))
    for position in range(len(raw)):
        for bit in (0, 7):
            changed = bytearray(raw)
            changed[position] ^= 1 << bit
            assert PKI.unseal(SEED, base64.b64encode(changed).decode()) is None, position
        assert PKI.unseal(SEED, base64.b64encode(raw[:position]).decode()) is None, position
    assert PKI.unseal(SEED, base64.b64encode(raw + b"\0").decode()) is None
    assert PKI.unseal(SEED, base64.b64encode(raw).decode()) == Secret("token")


@pytest.mark.parametrize(
    "sealed", ["", "====", "A", "Zürich", "\0", "not base64!", "A" * 100_000, "BA" * 60]
)
def test_junk_is_refused(sealed: str) -> None:
    assert PKI.unseal(SEED, sealed) is None


def test_bytes_of_any_kind_are_refused() -> None:
    chance = random.Random(2016)
    for _ in range(300):
        raw = b"\x04" * chance.randint(0, 1) + chance.randbytes(chance.randint(0, 150))
        assert PKI.unseal(SEED, base64.b64encode(raw).decode()) is None
