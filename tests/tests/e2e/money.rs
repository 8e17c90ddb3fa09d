//! Hard caps: no account spends one token more than it has, whoever races for it.

use futures::future::join_all;
use serde_json::{Value, json};
use sluice_tests::{Cluster, ClusterOptions, Customer, Price, Reply, Transcript, assert_error, random_model};

/// A platform whose model never ends by itself: what stops an answer is its limit, or the money.
async fn endless() -> Cluster {
    Cluster::start_with(ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() })
        .await
}

fn question(cluster: &Cluster) -> Value {
    cluster.question("How long is the river?", 400)
}

/// What the prompt of [`question`] is counted as.
async fn prompt_tokens(cluster: &Cluster) -> u64 {
    let mut body = question(cluster);
    body["max_tokens"] = json!(1);
    let (prompt, completion) = cluster.chat(&body).await.usage();
    assert_eq!(completion, 1);
    prompt
}

async fn ask(cluster: &Cluster, customer: &Customer) -> Result<Transcript, Reply> {
    let stream = cluster.stream("/chat/completions", &customer.key, &question(cluster)).await?;
    Ok(stream.finish().await)
}

fn assert_no_credit(reply: &Reply) {
    assert_error("no credit", reply, 429, Some("insufficient_quota"), None);
    assert_eq!(reply.json()["error"]["type"], "insufficient_quota");
    assert_eq!(reply.header("x-should-retry"), Some("false"), "credit does not come back by itself");
}

#[tokio::test]
async fn an_account_without_credit_is_refused() {
    let cluster = endless().await;
    let broke = cluster.customer("broke", None).await;
    let before = cluster.metrics().await.node_prompt_tokens();
    for stream in [false, true] {
        let mut body = question(&cluster);
        body["stream"] = json!(stream);
        assert_no_credit(&cluster.post("/chat/completions", &broke.key, &body).await);
    }
    assert_eq!(cluster.metrics().await.node_prompt_tokens(), before, "nothing reached the node");

    // Credit that does not even cover the prompt is no credit.
    let Price { input_pico, output_pico, .. } = cluster.price().await;
    let prompt = prompt_tokens(&cluster).await as i64;
    let poor = cluster.customer("poor", Some(prompt * input_pico + output_pico - 1)).await;
    assert_no_credit(&ask(&cluster, &poor).await.expect_err("a refusal"));
    cluster.finish().await;
}

#[tokio::test]
async fn credit_makes_a_refused_account_work_at_once() {
    let cluster = endless().await;
    let customer = cluster.customer("late", None).await;
    assert_no_credit(&ask(&cluster, &customer).await.expect_err("a refusal"));
    cluster.credit(&customer, 1_000_000_000_000).await;
    let answer = sluice_tests::eventually("the credit is seen", async || {
        ask(&cluster, &customer).await.map_err(|reply| reply.text)
    })
    .await;
    assert_eq!(answer.usage().1, 400);
    cluster.finish().await;
}

/// The cap falls on a token, whether or not something too small for another one is left over.
#[tokio::test]
async fn generation_stops_at_the_token_the_budget_affords() {
    let cluster = endless().await;
    let Price { input_pico, output_pico, .. } = cluster.price().await;
    let prompt = prompt_tokens(&cluster).await;
    let whole = cluster.stream_chat(&question(&cluster)).await;
    for (tokens, rest) in
        [(1, 0), (2, output_pico - 1), (17, 0), (63, 1), (64, 0), (65, 0), (255, output_pico - 1)]
    {
        let credit = prompt as i64 * input_pico + tokens * output_pico + rest;
        let customer = cluster.customer(&format!("capped-{tokens}"), Some(credit)).await;
        let answer = ask(&cluster, &customer).await.unwrap_or_else(|reply| panic!("{tokens}: {reply:?}"));
        assert_eq!(answer.usage(), (prompt, tokens as u64), "the budget affords {tokens} tokens");
        assert_eq!(answer.finish_reason.as_deref(), Some("length"));
        let said = answer.frames.iter().any(|frame| frame["sluice"]["finish_reason"] == "budget");
        assert!(said, "a chunk says that it was the budget: {:#?}", answer.frames.last());
        assert!(whole.content.starts_with(&answer.content), "the part is the start of the whole");
        assert_no_credit(&ask(&cluster, &customer).await.expect_err("nothing is left"));
        cluster.settled().await;
        assert_eq!(cluster.balance_of(&customer).await, rest, "what is left after {tokens} tokens");
    }
    cluster.finish().await;
}

#[tokio::test]
async fn a_budget_stops_a_whole_answer_and_grpc_too() {
    let cluster = endless().await;
    let Price { input_pico, output_pico, .. } = cluster.price().await;
    let prompt = prompt_tokens(&cluster).await;
    let credit = prompt as i64 * input_pico + 30 * output_pico;

    let customer = cluster.customer("whole", Some(credit)).await;
    let reply = cluster.post("/chat/completions", &customer.key, &question(&cluster)).await;
    assert_eq!(reply.usage(), (prompt, 30));
    assert_eq!(reply.ok()["choices"][0]["finish_reason"], "length");
    assert_eq!(reply.header("x-sluice-finish-reason"), Some("budget"));

    let customer = cluster.customer("grpc", Some(credit)).await;
    let last = cluster.grpc_stream(&customer.key, &question(&cluster), usize::MAX).await;
    let last = last.expect("a last message");
    assert_eq!(last.usage.as_ref().expect("usage").completion_tokens, 30);
    assert_eq!(last.finish_reason(), sluice_proto::v1::FinishReason::Budget);
    cluster.settled().await;
    assert_eq!(cluster.balance_of(&customer).await, 0);
    cluster.finish().await;
}

/// Fifty streams race for one small budget: it is spent to the last token that fits, and never beyond.
#[tokio::test]
async fn fifty_streams_never_overshoot_a_shared_budget() {
    let cluster = endless().await;
    let Price { input_pico, output_pico, .. } = cluster.price().await;
    let prompt = prompt_tokens(&cluster).await as i64;
    let credit = 50 * prompt * input_pico + 1_003 * output_pico + 7;
    let customer = cluster.customer("racing", Some(credit)).await;
    let before = cluster.metrics().await.node_output_tokens();

    let answers = join_all((0..50).map(|_| ask(&cluster, &customer))).await;
    let (mut spent, mut generated) = (0, 0);
    for answer in answers {
        match answer {
            Ok(answer) => {
                let (prompt, completion) = answer.usage();
                assert_eq!(answer.finish_reason.as_deref(), Some("length"));
                spent += prompt as i64 * input_pico + completion as i64 * output_pico;
                generated += completion;
            }
            Err(refusal) => assert_no_credit(&refusal),
        }
    }
    cluster.settled().await;
    assert!(generated > 0, "some of them got something");
    assert!(spent <= credit, "{spent} of {credit} spent");
    assert_eq!(cluster.balance_of(&customer).await, credit - spent, "what was billed is what was answered");
    let counted = cluster.metrics().await.node_output_tokens() - before;
    assert_eq!(counted, generated, "the engine computed what was answered, and nothing more");

    // What holds gave back is still there to be spent, to the last token.
    while let Ok(answer) = ask(&cluster, &customer).await {
        let (prompt, completion) = answer.usage();
        spent += prompt as i64 * input_pico + completion as i64 * output_pico;
    }
    cluster.settled().await;
    let rest = cluster.balance_of(&customer).await;
    assert_eq!(rest, credit - spent);
    assert!((0..prompt * input_pico + output_pico).contains(&rest), "{rest} is left");
    cluster.finish().await;
}

/// One customer's empty account is no concern of another's.
#[tokio::test]
async fn accounts_are_apart() {
    let cluster = endless().await;
    let (rich, broke) =
        (cluster.customer("rich", Some(1_000_000_000_000)).await, cluster.customer("broke", None).await);
    let before = cluster.balance_pico().await;
    let (answer, refusal) = tokio::join!(ask(&cluster, &rich), ask(&cluster, &broke));
    let (prompt, completion) = answer.expect("an answer").usage();
    assert_no_credit(&refusal.expect_err("a refusal"));
    cluster.settled().await;
    let cost = cluster.price().await.of(prompt, completion);
    assert_eq!(cluster.balance_of(&rich).await, 1_000_000_000_000 - cost);
    assert_eq!(cluster.balance_pico().await, before, "the default account paid nothing");
    cluster.finish().await;
}
