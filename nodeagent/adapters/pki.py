"""Keys and certificates: derived, issued, sealed, by the `cryptography` library."""

from __future__ import annotations

import base64
import datetime
import secrets

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from nodeagent.errors import HostError, Secret
from nodeagent.host import Certificate

CURVE = ec.SECP256R1()  # what every TLS of the last ten years speaks, Consul 1.8's included
# SEC 2, 2.4.2: the order of the curve's group; private keys are 1 to N - 1.
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
SEALING = Suite(KEM.P256, KDF.HKDF_SHA256, AEAD.AES_256_GCM)  # RFC 9180
SEED_BYTES = 32
_NO_CERTIFICATE = (  # what the library says of one that was damaged
    ValueError,
    UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
# Clocks differ: what is issued now is valid on a machine that is an hour behind. SwarmKit's
# figure (ca/certificates.go, CertBackdate), as is the next (RootCAExpiration).
BACKDATE = datetime.timedelta(hours=1)
CA_LIFETIME = datetime.timedelta(days=20 * 365)


class LocalPki:
    """Computes with keys; touches nothing outside but the system's source of randomness."""

    def seed(self) -> Secret:
        return Secret(base64.b64encode(secrets.token_bytes(SEED_BYTES)).decode())

    def derive(self, seed: Secret, purpose: str, size_bytes: int = 32) -> bytes:
        # `info` keeps what is derived for one purpose apart from all others (RFC 5869, 3.2).
        kdf = HKDF(hashes.SHA256(), size_bytes, salt=None, info=f"nodeagent 1 {purpose}".encode())
        return kdf.derive(base64.b64decode(seed.reveal()))

    def authority(self, seed: Secret, now: float) -> str:
        key = self._authority_key(seed)
        name = _name("nodeagent cluster CA")
        builder = _builder(name, name, key, _time(now) + CA_LIFETIME, now)
        builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), True)
        # With which OpenSSL tells two CAs of one name apart, while one replaces the other.
        identifier = x509.SubjectKeyIdentifier.from_public_key(key.public_key())
        builder = builder.add_extension(identifier, False)
        return _signed(builder.add_extension(_usage(signs_certificates=True), True), key)

    def issue(
        self, seed: Secret, authority: str, names: tuple[str, ...], lifetime_s: float, now: float
    ) -> Secret:
        ca = x509.load_pem_x509_certificate(authority.encode())
        if _time(now) >= ca.not_valid_after_utc:
            raise HostError("issue", "a certificate", "the CA's own has ended, by this clock")
        end = min(_time(now) + datetime.timedelta(seconds=lifetime_s), ca.not_valid_after_utc)
        key = ec.generate_private_key(CURVE)
        uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
        if names[0].startswith("server."):
            uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
        alternatives = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        own_key = self._authority_key(seed)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(own_key.public_key())
        builder = (
            _builder(_name(names[0]), ca.subject, key, end, now)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), True)
            .add_extension(_usage(signs_certificates=False), True)
            .add_extension(x509.ExtendedKeyUsage(uses), False)
            .add_extension(alternatives, False)
            .add_extension(issuer, False)
        )
        certificate = _signed(builder, own_key)
        private = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        return Secret(certificate + private.decode())

    def certificates(self, pem: str) -> tuple[Certificate, ...]:
        try:
            found = x509.load_pem_x509_certificates(pem.encode())
            return tuple(_described(each) for each in found)
        except _NO_CERTIFICATE as error:
            raise HostError("read", "a certificate", "it is not one in PEM form") from error

    def matches(self, seed: Secret, authority: str) -> bool:
        ca = x509.load_pem_x509_certificate(authority.encode())
        return ca.public_key() == self._authority_key(seed).public_key()

    def is_signed(self, certificate: str, authority: str) -> bool:
        found = x509.load_pem_x509_certificate(certificate.encode())
        try:
            found.verify_directly_issued_by(x509.load_pem_x509_certificate(authority.encode()))
        except (InvalidSignature, ValueError):  # ValueError: the issuer's name is another
            return False
        return True

    def seal(self, authority: str, text: Secret) -> str:
        public = x509.load_pem_x509_certificate(authority.encode()).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        return base64.b64encode(SEALING.encrypt(text.reveal().encode(), public)).decode()

    def unseal(self, seed: Secret, sealed: str) -> Secret | None:
        try:
            box = base64.b64decode(sealed, validate=True)
            return Secret(SEALING.decrypt(box, self._authority_key(seed)).decode())
        except (ValueError, InvalidTag):
            return None

    def _authority_key(self, seed: Secret) -> ec.EllipticCurvePrivateKey:
        # 16 bytes more than the order has: what is lost of uniformity is below 2^-128
        # (FIPS 186-5, A.2.1).
        number = int.from_bytes(self.derive(seed, "ca", 48), "big") % (ORDER - 1) + 1
        return ec.derive_private_key(number, CURVE)


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _time(now: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(now), datetime.timezone.utc)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePrivateKey,
    end: datetime.datetime,
    now: float,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now) - BACKDATE)
        .not_valid_after(end)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _signed(builder: x509.CertificateBuilder, key: ec.EllipticCurvePrivateKey) -> str:
    made = builder.sign(key, hashes.SHA256())
    return made.public_bytes(serialization.Encoding.PEM).decode()


def _described(found: x509.Certificate) -> Certificate:
    found.public_key()  # read only when it is asked for, and damaged perhaps
    try:
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns_names = tuple(names.get_values_for_type(x509.DNSName))
    except x509.ExtensionNotFound:
        dns_names = ()
    return Certificate(
        names=dns_names,
        not_before=found.not_valid_before_utc.timestamp(),
        not_after=found.not_valid_after_utc.timestamp(),
    )
