use serde_json::{Map, json};
use uuid::Uuid;

use super::*;

/// RFC 8037, appendix A.1.
const SECRET_JWK: &str = r#"{"kty":"OKP","crv":"Ed25519",
    "d":"nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}"#;
const X: &str = "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo";
/// RFC 8037, appendix A.3.
const KID: &str = "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k";

fn signer() -> ReceiptSigner {
    ReceiptSigner::from_jwk(SECRET_JWK).expect("the RFC's key")
}

fn other_signer() -> ReceiptSigner {
    ReceiptSigner::from_seed(&[7; 32])
}

fn keys() -> ReceiptKeys {
    ReceiptKeys::new([signer().public().clone()])
}

fn book() -> PriceBook {
    let prices = [("input", "0.40"), ("cached_input", "0.04"), ("output", "2.20")].map(|(meter, price)| {
        format!("[[price]]\nmodel = \"m\"\nmeter = \"{meter}\"\nusd_per_million = \"{price}\"\n")
    });
    let head = "currency = \"USD\"\neffective_from = \"2026-01-01T00:00:00Z\"\n";
    PriceBook::from_toml(&(head.to_owned() + &prices.concat())).expect("a book")
}

fn bill() -> UsageEvent {
    let quantities =
        Quantities { input_tokens: 26, cached_input_tokens: 64, output_tokens: 31, ..Quantities::default() };
    UsageEvent {
        request_id: RequestId::new(Uuid::from_u128(0x0192_8f4e_0000_7000_8000_0000_0000_0001)),
        account: AccountId::new("acct-1"),
        org: "org-1".into(),
        project: "proj-1".into(),
        api_key: "key_1".into(),
        user: "private end user".into(),
        model: "m".into(),
        service_tier: ServiceTier::Default,
        node: "private-node".into(),
        quantities,
        overrun_tokens: 0,
        finish_reason: FinishReason::Stop,
        time_to_first_token_ms: Some(5),
        duration_ms: 9,
        admitted_at_ms: 1_767_323_045_678,
        price_book: book().hash().clone(),
        cost: Money::from_pico(26 * 400_000 + 64 * 40_000 + 31 * 2_200_000),
        budgets: vec!["private-budget".into()],
    }
}

/// A receipt with what a test wants in it, signed by the known key as if we had made it.
fn signed(header: &Value, payload: &Value) -> String {
    signer().compact(header.to_string().as_bytes(), payload.to_string().as_bytes())
}

fn header() -> Value {
    json!({ "alg": ALGORITHM, "typ": TYPE, "kid": KID })
}

fn payload() -> Value {
    serde_json::to_value(Receipt::of(&bill())).expect("a receipt is plain data")
}

#[test]
fn the_examples_of_rfc_8037_come_out_as_printed() {
    let signer = signer();
    assert_eq!(signer.public().kid(), KID);
    let jws = signer.compact(br#"{"alg":"EdDSA"}"#, b"Example of Ed25519 signing");
    assert_eq!(
        jws,
        "eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc.hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR\
         4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg"
    );
    let (text, signature) = jws.rsplit_once('.').expect("three parts");
    let signature = BASE64URL.decode(signature).expect("base64url");
    let key = ReceiptKey::from_x(X).expect("the RFC's public key");
    assert!(key.has_signed(text.as_bytes(), &signature));
    assert!(!other_signer().public().has_signed(text.as_bytes(), &signature));
}

#[test]
fn a_receipt_states_what_was_billed_and_nothing_private() {
    let jws = signer().sign(&bill());
    let stated = keys().verify(&jws).expect("our own receipt");
    assert_eq!(stated, Receipt::of(&bill()));
    stated.check_bill(&Receipt::of(&bill())).expect("the bill that it is of");
    stated.check_cost(&book()).expect("the cost of its quantities");

    let parts: Vec<_> = jws.split('.').map(|part| BASE64URL.decode(part).expect("base64url")).collect();
    let text = |part: &[u8]| String::from_utf8(part.to_vec()).expect("UTF-8");
    assert_eq!(text(&parts[0]), format!(r#"{{"alg":"EdDSA","typ":"sluice-receipt+jws","kid":"{KID}"}}"#));
    // Customers keep receipts and read them with programs of their own: this form may only grow.
    let expect = format!(
        "{}{}{}",
        r#"{"version":1,"request_id":"01928f4e-0000-7000-8000-000000000001","account":"acct-1","org":"org-1","project":"proj-1","api_key":"key_1","model":"m","service_tier":"default","#,
        r#""quantities":{"input_tokens":26,"cached_input_tokens":64,"output_tokens":31,"reasoning_tokens":0,"characters":0,"seconds":0,"images":0},"finish_reason":"stop","#,
        format_args!(
            r#""admitted_at":"2026-01-02T03:04:05.678Z","price_book":"{}","currency":"USD","cost":"0.00008116"}}"#,
            book().hash()
        ),
    );
    assert_eq!(text(&parts[1]), expect);
    assert!(!text(&parts[1]).contains("private"));
    assert!(jws.len() < 2048, "{}", jws.len());
}

/// Every value of header and payload, one at a time, under the signature of the true ones.
#[test]
fn a_change_of_any_field_is_found() {
    let jws = signed(&header(), &payload());
    keys().verify(&jws).expect("unchanged, it is good");
    let signature = jws.rsplit_once('.').expect("three parts").1;
    let check = |header: &Value, payload: &Value, what: &str| {
        let part = |value: &Value| BASE64URL.encode(value.to_string());
        let forged = format!("{}.{}.{signature}", part(header), part(payload));
        assert_ne!(forged, jws, "{what} was changed");
        let error = keys().verify(&forged).expect_err(what);
        let expected = match what {
            "alg" => matches!(error, ReceiptError::Algorithm(_)),
            "typ" => matches!(error, ReceiptError::Type(_)),
            "kid" => matches!(error, ReceiptError::UnknownKey { .. }),
            _ => matches!(error, ReceiptError::Signature),
        };
        assert!(expected, "{what}: {error}");
    };
    let changed = |value: &Value| match value {
        Value::String(text) => json!(format!("{text}0")),
        Value::Number(number) => json!(number.as_u64().expect("a count") + 1),
        other => panic!("no such value in a receipt: {other}"),
    };
    let mut fields = 0;
    for name in ["alg", "typ", "kid"] {
        let mut header = header();
        header[name] = changed(&header[name]);
        check(&header, &payload(), name);
    }
    for (name, value) in payload().as_object().expect("an object") {
        let values =
            value.as_object().cloned().unwrap_or_else(|| Map::from_iter([(String::new(), value.clone())]));
        for (inner, value) in values {
            let mut payload = payload();
            let place = if inner.is_empty() { &mut payload[name] } else { &mut payload[name][&inner] };
            *place = changed(&value);
            check(&header(), &payload, name);
            fields += 1;
        }
        let mut shorter = payload();
        shorter.as_object_mut().expect("an object").remove(name);
        check(&header(), &shorter, name);
    }
    assert!(fields >= 20, "{fields} values were changed");
}

#[test]
fn a_change_of_any_character_is_found() {
    let jws = signer().sign(&bill());
    for at in 0..jws.len() {
        for by in ['A', 'B', '_', '.'] {
            let forged = format!("{}{by}{}", &jws[..at], &jws[at + 1..]);
            assert_eq!(keys().verify(&forged).is_ok(), forged == jws, "character {at} became {by}");
        }
        let cut = format!("{}{}", &jws[..at], &jws[at + 1..]);
        assert!(keys().verify(&cut).is_err(), "character {at} was left out");
    }
}

#[test]
fn what_is_not_a_receipt_is_refused_for_what_it_is() {
    let good = signer().sign(&bill());
    let check = |jws: &str, expect: &str| {
        let error = keys().verify(jws).expect_err(expect);
        let source = std::error::Error::source(&error).map_or(String::new(), |source| format!(": {source}"));
        assert!(format!("{error}{source}").contains(expect), "{error}{source}, not {expect}");
    };
    for end in ["=", "A", "\n", " ", ".", ".e30"] {
        check(&format!("{good}{end}"), if end.starts_with('.') { "three parts" } else { "" });
    }
    check("", "three parts");
    check("a.b", "three parts");
    check(&good.replacen('e', "ä", 1), "the first is not base64url");
    check(&"A".repeat(RECEIPT_BYTES_MAX + 1), "longer than 8192 bytes");
    let unsigned = |header: &Value| {
        let part = |value: &Value| BASE64URL.encode(value.to_string());
        format!("{}.{}.", part(header), part(&payload()))
    };
    check(&unsigned(&json!({ "alg": "none", "typ": TYPE, "kid": KID })), "the algorithm \"none\"");
    check(&unsigned(&header()), "the signature does not fit");
    for algorithm in ["none", "HS256", "ES256", "Ed25519", "eddsa"] {
        let header = json!({ "alg": algorithm, "typ": TYPE, "kid": KID });
        check(&signed(&header, &payload()), &format!("the algorithm {algorithm:?}"));
    }
    check(&signed(&json!({ "typ": TYPE, "kid": KID }), &payload()), "the algorithm \"null\"");
    check(&signed(&json!({ "alg": ALGORITHM, "typ": "JWT", "kid": KID }), &payload()), "it is a \"JWT\"");
    check(&signed(&json!({ "alg": ALGORITHM, "typ": TYPE }), &payload()), "missing field `kid`");
    for (name, value) in [("crit", json!(["b64"])), ("jwk", json!({})), ("jku", json!("https://a.example"))] {
        let mut header = header();
        header[name] = value;
        check(&signed(&header, &payload()), &format!("unknown field `{name}`"));
    }
    check(&other_signer().sign(&bill()), "which is not among those given");
    let of_another_key =
        other_signer().compact(header().to_string().as_bytes(), payload().to_string().as_bytes());
    check(&of_another_key, "the signature does not fit");
    let with = |name: &str, value: Value| {
        let mut payload = payload();
        payload[name] = value;
        signed(&header(), &payload)
    };
    check(&with("version", json!(2)), "version 2");
    check(&with("tip", json!("1.00")), "unknown field `tip`");
    check(&with("cost", json!(0.5)), "invalid type");
    check(&signer().compact(header().to_string().as_bytes(), b"[]"), "what it states cannot be read");
}

#[test]
fn a_receipt_is_held_against_prices_and_the_bill() {
    let receipt = Receipt::of(&bill());
    let dearer = book().canonical().replace("2.200000", "2.200001");
    let dearer = PriceBook::from_toml(&dearer).expect("a book");
    assert!(
        matches!(receipt.check_cost(&dearer), Err(Mismatch::PriceBook { found, .. }) if found == *dearer.hash())
    );
    let overcharged = Receipt { cost: Money::from_pico(receipt.cost.pico() + 1), ..receipt.clone() };
    let error = overcharged.check_cost(&book()).expect_err("a pico-dollar too much").to_string();
    assert_eq!(
        error,
        "the cost derived from the price book is 0.00008116 USD, but the receipt says 0.000081160001 USD"
    );
    let unknown = Receipt { model: "n".into(), ..receipt.clone() };
    assert!(matches!(unknown.check_cost(&book()), Err(Mismatch::Unpriced(PriceError::NoModel { .. }))));

    let check = |change: fn(&mut UsageEvent), expect: &str| {
        let mut bill = bill();
        change(&mut bill);
        match receipt.check_bill(&Receipt::of(&bill)) {
            Err(Mismatch::Bill { field, .. }) => assert_eq!(field, expect),
            other => panic!("{expect} differs: {other:?}"),
        }
    };
    check(|bill| bill.request_id = RequestId::new(Uuid::from_u128(2)), "request_id");
    check(|bill| bill.account = AccountId::new("acct-2"), "account");
    check(|bill| bill.org.push('x'), "org");
    check(|bill| bill.project.push('x'), "project");
    check(|bill| bill.api_key.push('x'), "api_key");
    check(|bill| bill.model.push('x'), "model");
    check(|bill| bill.service_tier = ServiceTier::Batch, "service_tier");
    check(|bill| bill.quantities.cached_input_tokens -= 1, "quantities");
    check(|bill| bill.finish_reason = FinishReason::Budget, "finish_reason");
    check(|bill| bill.admitted_at_ms += 1, "admitted_at");
    check(|bill| bill.admitted_at_ms = i64::MIN, "admitted_at");
    check(|bill| bill.price_book = PriceBookHash::from_stored("0".into()), "price_book");
    check(|bill| bill.cost = Money::ZERO, "cost");
}

#[test]
fn after_a_rotation_old_receipts_are_still_good() {
    let (old, new) = (signer(), other_signer());
    let receipts = [old.sign(&bill()), new.sign(&bill())];
    let both = ReceiptKeys::new([new.public().clone(), old.public().clone(), new.public().clone()]);
    let read_back = ReceiptKeys::from_jwks(&both.to_jwks()).expect("our own set");
    assert_eq!((&read_back, read_back.iter().count()), (&both, 2));
    for receipt in &receipts {
        assert_eq!(read_back.verify(receipt).expect("a listed key"), Receipt::of(&bill()));
    }
    let new_alone = ReceiptKeys::new([new.public().clone()]);
    assert!(matches!(new_alone.verify(&receipts[0]), Err(ReceiptError::UnknownKey { .. })));
}

#[test]
fn a_secret_stays_where_it_belongs() {
    let signer = signer();
    let secret = "nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A";
    let seed = BASE64URL.decode(secret).expect("base64url").try_into().expect("32 bytes");
    let jwk = ReceiptSigner::jwk_of_seed(&seed);
    assert!(jwk.contains(secret));
    assert_eq!(ReceiptSigner::from_jwk(&jwk).expect("its own form").public(), signer.public());
    assert!(!format!("{signer:?}").contains(secret));
    assert_eq!(
        keys().to_jwks(),
        format!(
            r#"{{"keys":[{{"kty":"OKP","crv":"Ed25519","x":"{X}","kid":"{KID}","alg":"EdDSA","use":"sig"}}]}}"#
        )
    );
    assert!(matches!(ReceiptKey::from_jwk(SECRET_JWK), Err(ReceiptKeyError::Secret)));
}

#[test]
fn a_damaged_key_is_refused_with_the_member_at_fault() {
    let check = |member: &str, value: Value, expect: &str| {
        let mut jwk: Value = serde_json::from_str(SECRET_JWK).expect("JSON");
        jwk[member] = value;
        let error = ReceiptSigner::from_jwk(&jwk.to_string()).expect_err(expect).to_string();
        assert!(error.contains(expect), "{error}, not {expect}");
    };
    check("kty", json!("EC"), "kty is \"EC\"; a receipt's key has \"OKP\"");
    check("crv", json!("X25519"), "crv is \"X25519\"");
    check("alg", json!("HS256"), "alg is \"HS256\"");
    check("use", json!("enc"), "use is \"enc\"");
    check("kid", json!("mine"), "kid is \"mine\"");
    check("x", Value::Null, "x is not 32 bytes");
    check("x", json!("AAAA"), "x is not 32 bytes");
    check("x", json!(X.replace('_', "/")), "x is not 32 bytes");
    check("x", json!(BASE64URL.encode([0; 32])), "d and x are not of one key");
    check("d", Value::Null, "no secret part");
    check("d", json!("AAAA"), "d is not 32 bytes");
    check("d", json!(BASE64URL.encode([7; 32])), "d and x are not of one key");
    assert!(matches!(ReceiptSigner::from_jwk("{}"), Err(ReceiptKeyError::Json(_))));

    let foreign = r#"{"keys":[{"kty":"RSA","n":"AQAB","e":"AQAB"},{"kty":"OKP","crv":"X25519","x":""}]}"#;
    assert!(matches!(ReceiptKeys::from_jwks(foreign), Err(ReceiptKeyError::Empty)));
    let beside = foreign.replace("]}", &format!(",{{\"kty\":\"OKP\",\"crv\":\"Ed25519\",\"x\":\"{X}\"}}]}}"));
    assert_eq!(ReceiptKeys::from_jwks(&beside).expect("ours is among them"), keys());
    let torn = beside.replace(X, "AAAA");
    assert!(matches!(ReceiptKeys::from_jwks(&torn), Err(ReceiptKeyError::Length("x"))));
}
