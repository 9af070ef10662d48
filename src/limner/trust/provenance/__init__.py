"""Where a picture comes from: C2PA manifests signed with the operator's certificate, and reading them back."""

from limner.trust.provenance.development import development_credentials
from limner.trust.provenance.manifest import Ingredient, sign
from limner.trust.provenance.report import ProvenanceReport, read
from limner.trust.provenance.signer import Signer

__all__ = ["Ingredient", "ProvenanceReport", "Signer", "development_credentials", "read", "sign"]
