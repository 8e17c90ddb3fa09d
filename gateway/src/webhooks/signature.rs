//! Standard Webhooks signatures (standardwebhooks.com, version 1.0): `v1,` and the base64 of an HMAC-SHA256.
//!
//! ```text
//! signed content    WEBHOOK-ID "." WEBHOOK-TIMESTAMP "." BODY
//! secret            whsec_ and the base64 of 24 to 64 random bytes
//! webhook-signature one signature a secret in force, the newest first, with a space between
//! ```

use base64::{Engine, engine::general_purpose::STANDARD as BASE64};
use ring::hmac;

const PREFIX: &str = "whsec_";
const GENERATED_BYTES: usize = 32;
const BYTES_MIN: usize = 24;
const BYTES_MAX: usize = 64;

/// What a receiver and we both know of an endpoint. Its `Debug` shows nothing of it.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Vec<u8>);

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl Secret {
    /// A new random secret: 256 bits from the operating system.
    pub fn generate() -> Secret {
        let mut bytes = vec![0u8; GENERATED_BYTES];
        getrandom::fill(&mut bytes).expect("the operating system gives random bytes");
        Secret(bytes)
    }

    /// Reads `whsec_BASE64`; the error goes on from the field's name.
    pub fn parse(text: &str) -> Result<Secret, String> {
        let encoded = text
            .strip_prefix(PREFIX)
            .ok_or_else(|| format!("must begin with {PREFIX}; leave it out to get one"))?;
        let bytes =
            BASE64.decode(encoded).map_err(|_| format!("must be {PREFIX} and base64 with its padding"))?;
        match (BYTES_MIN..=BYTES_MAX).contains(&bytes.len()) {
            true => Ok(Secret(bytes)),
            false => Err(format!("must hold {BYTES_MIN} to {BYTES_MAX} bytes, but holds {}", bytes.len())),
        }
    }

    /// The whole secret, to be shown once.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}{}", BASE64.encode(&self.0))
    }

    fn sign(&self, id: &str, timestamp_s: i64, body: &str) -> String {
        let key = hmac::Key::new(hmac::HMAC_SHA256, &self.0);
        let signed = hmac::sign(&key, format!("{id}.{timestamp_s}.{body}").as_bytes());
        format!("v1,{}", BASE64.encode(signed))
    }
}

/// The value of `webhook-signature`: during a rotation, receivers may know the new secret or the one before it.
pub fn sign(secrets: &[Secret], id: &str, timestamp_s: i64, body: &str) -> String {
    secrets.iter().map(|secret| secret.sign(id, timestamp_s, body)).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the Standard Webhooks specification and of its reference libraries.
    #[test]
    fn signs_as_the_reference_does() {
        let secret = Secret::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").expect("a secret");
        let signed =
            sign(&[secret], "msg_p5jXN8AQM9LWM0D4loKWxJek", 1_614_265_330, r#"{"test": 2432232314}"#);
        assert_eq!(signed, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn signs_with_every_secret_in_force() {
        let (new, old) = (Secret::generate(), Secret::generate());
        let both = sign(&[new.clone(), old.clone()], "evt_1", 1, "{}");
        let each = [sign(&[new], "evt_1", 1, "{}"), sign(&[old], "evt_1", 1, "{}")];
        assert_eq!(both, each.join(" "));
        assert_ne!(each[0], each[1]);
    }

    #[test]
    fn a_secret_is_read_as_it_is_shown_and_its_faults_are_named() {
        let secret = Secret::generate();
        assert_eq!(Secret::parse(&secret.reveal()), Ok(secret.clone()));
        assert_eq!(format!("{secret:?}"), "Secret(…)");
        for (text, expect) in [
            ("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", "must begin with whsec_"),
            ("whsec_*", "base64"),
            ("whsec_AAAA", "must hold 24 to 64 bytes, but holds 3"),
        ] {
            let fault = Secret::parse(text).expect_err("not a secret");
            assert!(fault.contains(expect), "{text}: {fault}");
        }
    }
}
