//! The keys that receipts are signed and checked with, as JSON Web Keys (RFC 7517, RFC 8037).
//!
//! A key's id is its thumbprint (RFC 7638), so it follows from the key: nobody chooses one, and two cannot share one.
//!
//! ```text
//! secret   {"kty":"OKP","crv":"Ed25519","x":"11qYAYKx..","d":"nWGxne_9.."}                      in a private file
//! public   {"keys":[{"kty":"OKP","crv":"Ed25519","x":"11qYAYKx..","kid":"kPrK_qmx..",..}]}      for everybody
//! ```

use std::fmt;

use base64::{Engine, prelude::BASE64_URL_SAFE_NO_PAD as BASE64URL};
use ring::signature::{ED25519, Ed25519KeyPair, KeyPair, Signature, UnparsedPublicKey};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const KEY_TYPE: &str = "OKP";
const CURVE: &str = "Ed25519";
/// Of a public key and of a secret one.
const KEY_BYTES: usize = 32;

/// A key that signs receipts. Its secret is in no `Debug` text.
pub struct ReceiptSigner {
    secret: Ed25519KeyPair,
    public: ReceiptKey,
}

/// A key that checks receipts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptKey {
    kid: String,
    key: [u8; KEY_BYTES],
}

/// The keys that a checker trusts: today's, and those of earlier receipts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceiptKeys(Vec<ReceiptKey>);

/// Why a text is not a key, or not a set of them.
#[derive(Debug, thiserror::Error)]
pub enum ReceiptKeyError {
    #[error("it is not a JSON Web Key")]
    Json(#[from] serde_json::Error),
    #[error("{field} is {found:?}; a receipt's key has {expected:?}")]
    Field { field: &'static str, found: String, expected: String },
    #[error("{0} is not 32 bytes in base64url without padding")]
    Length(&'static str),
    #[error("the key has no secret part (d): this is a public key")]
    NoSecret,
    #[error("the key has a secret part (d), which belongs into nobody's hands: give the public key")]
    Secret,
    #[error("d and x are not of one key")]
    Torn,
    #[error("the set has no key that signs receipts (kty {KEY_TYPE}, crv {CURVE})")]
    Empty,
}

/// What is read of a JWK; members that are not understood are ignored, as RFC 7517 asks.
#[derive(Deserialize)]
struct Jwk {
    kty: String,
    crv: Option<String>,
    x: Option<String>,
    d: Option<String>,
    kid: Option<String>,
    alg: Option<String>,
    #[serde(rename = "use")]
    purpose: Option<String>,
}

#[derive(Deserialize)]
struct JwkSet {
    keys: Vec<Value>,
}

#[derive(Serialize)]
struct PublicJwk<'a> {
    kty: &'static str,
    crv: &'static str,
    x: String,
    kid: &'a str,
    alg: &'static str,
    #[serde(rename = "use")]
    purpose: &'static str,
}

impl ReceiptSigner {
    pub fn from_seed(seed: &[u8; KEY_BYTES]) -> ReceiptSigner {
        let secret = Ed25519KeyPair::from_seed_unchecked(seed).expect("any 32 bytes are a seed");
        let public = secret.public_key().as_ref().try_into().expect("a public key has 32 bytes");
        ReceiptSigner { secret, public: ReceiptKey::new(public) }
    }

    /// Reads a secret JWK.
    pub fn from_jwk(text: &str) -> Result<ReceiptSigner, ReceiptKeyError> {
        let jwk: Jwk = serde_json::from_str(text)?;
        let public = jwk.public()?;
        let seed = jwk.d.as_deref().ok_or(ReceiptKeyError::NoSecret)?;
        let signer = ReceiptSigner::from_seed(&bytes_of("d", seed)?);
        match signer.public == public {
            true => Ok(signer),
            false => Err(ReceiptKeyError::Torn),
        }
    }

    /// The secret JWK of a seed: for a private file, and nothing else.
    pub fn jwk_of_seed(seed: &[u8; KEY_BYTES]) -> String {
        let public = ReceiptSigner::from_seed(seed).public;
        json!({ "kty": KEY_TYPE, "crv": CURVE, "x": public.x(), "d": BASE64URL.encode(seed) }).to_string()
    }

    pub fn public(&self) -> &ReceiptKey {
        &self.public
    }

    pub(super) fn signature(&self, text: &[u8]) -> Signature {
        self.secret.sign(text)
    }
}

impl fmt::Debug for ReceiptSigner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ReceiptSigner({})", self.public.kid)
    }
}

impl ReceiptKey {
    fn new(key: [u8; KEY_BYTES]) -> ReceiptKey {
        let x = BASE64URL.encode(key);
        // RFC 7638: the required members in the order of their names, without spaces.
        let canonical = format!("{{\"crv\":\"{CURVE}\",\"kty\":\"{KEY_TYPE}\",\"x\":\"{x}\"}}");
        ReceiptKey { kid: BASE64URL.encode(Sha256::digest(canonical)), key }
    }

    /// Reads a public JWK.
    pub fn from_jwk(text: &str) -> Result<ReceiptKey, ReceiptKeyError> {
        let jwk: Jwk = serde_json::from_str(text)?;
        match jwk.d {
            None => jwk.public(),
            Some(_) => Err(ReceiptKeyError::Secret),
        }
    }

    /// Reads what a JWK calls `x`: the public key itself, in base64url.
    pub fn from_x(x: &str) -> Result<ReceiptKey, ReceiptKeyError> {
        Ok(ReceiptKey::new(bytes_of("x", x)?))
    }

    /// The key's thumbprint, which receipts name.
    pub fn kid(&self) -> &str {
        &self.kid
    }

    fn x(&self) -> String {
        BASE64URL.encode(self.key)
    }

    pub(super) fn has_signed(&self, text: &[u8], signature: &[u8]) -> bool {
        UnparsedPublicKey::new(&ED25519, self.key).verify(text, signature).is_ok()
    }

    fn jwk(&self) -> PublicJwk<'_> {
        let (alg, purpose) = (super::ALGORITHM, "sig");
        PublicJwk { kty: KEY_TYPE, crv: CURVE, x: self.x(), kid: &self.kid, alg, purpose }
    }
}

impl ReceiptKeys {
    /// Keys given twice count once.
    pub fn new(keys: impl IntoIterator<Item = ReceiptKey>) -> ReceiptKeys {
        let mut known = ReceiptKeys::default();
        for key in keys {
            if known.get(&key.kid).is_none() {
                known.0.push(key);
            }
        }
        known
    }

    /// Reads a JWK set. Keys of other kinds are passed over, as RFC 7517 asks; a damaged one of ours is not.
    pub fn from_jwks(text: &str) -> Result<ReceiptKeys, ReceiptKeyError> {
        let set: JwkSet = serde_json::from_str(text)?;
        let of_our_kind = |jwk: &Value| jwk["kty"] == KEY_TYPE && jwk["crv"] == CURVE;
        let ours = set.keys.iter().filter(|jwk| of_our_kind(jwk));
        let keys = ours.map(|jwk| ReceiptKey::from_jwk(&jwk.to_string())).collect::<Result<Vec<_>, _>>()?;
        match keys.is_empty() {
            true => Err(ReceiptKeyError::Empty),
            false => Ok(ReceiptKeys::new(keys)),
        }
    }

    /// The JWK set that everybody may read.
    pub fn to_jwks(&self) -> String {
        let keys: Vec<_> = self.iter().map(ReceiptKey::jwk).collect();
        json!({ "keys": keys }).to_string()
    }

    pub fn get(&self, kid: &str) -> Option<&ReceiptKey> {
        self.iter().find(|key| key.kid == kid)
    }

    pub fn iter(&self) -> impl Iterator<Item = &ReceiptKey> {
        self.0.iter()
    }
}

impl Jwk {
    fn public(&self) -> Result<ReceiptKey, ReceiptKeyError> {
        let wanted = |field, found: Option<&str>, expected: &str| match found {
            Some(found) if found == expected => Ok(()),
            found => {
                let found = found.unwrap_or_default().to_owned();
                Err(ReceiptKeyError::Field { field, found, expected: expected.to_owned() })
            }
        };
        wanted("kty", Some(&self.kty), KEY_TYPE)?;
        wanted("crv", self.crv.as_deref(), CURVE)?;
        if self.alg.is_some() {
            wanted("alg", self.alg.as_deref(), super::ALGORITHM)?;
        }
        if self.purpose.is_some() {
            wanted("use", self.purpose.as_deref(), "sig")?;
        }
        let key = ReceiptKey::from_x(self.x.as_deref().unwrap_or_default())?;
        if self.kid.is_some() {
            wanted("kid", self.kid.as_deref(), &key.kid)?;
        }
        Ok(key)
    }
}

fn bytes_of(field: &'static str, text: &str) -> Result<[u8; KEY_BYTES], ReceiptKeyError> {
    let bytes = BASE64URL.decode(text).map_err(|_| ReceiptKeyError::Length(field))?;
    bytes.try_into().map_err(|_| ReceiptKeyError::Length(field))
}
