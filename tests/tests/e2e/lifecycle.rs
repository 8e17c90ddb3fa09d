//! Starting, stopping, dying: nothing is lost, and every refusal to start says what to do.

use std::path::Path;

use futures::future::join_all;
use sluice_tests::{
    Cluster, ClusterOptions, Process, Signal, bundled_model, copy_of, eventually, random_model, run_to_end,
};

async fn endless() -> Cluster {
    Cluster::start_with(ClusterOptions { model: Some(random_model().await), ..ClusterOptions::default() })
        .await
}

#[tokio::test]
async fn a_second_start_keeps_everything() {
    let mut cluster = Cluster::start().await;
    let (key, admin_key, model) = (cluster.api_key.clone(), cluster.admin_key.clone(), cluster.model.clone());
    let answer = cluster.chat(&cluster.question("What is a lock?", 12)).await;
    let extra = cluster.cli(&["keys", "create", "--name", "kept"]).await;
    cluster.stop(Signal::Terminate).await;
    let (usage, balance) = (cluster.usage(&[]).await, cluster.balance_pico().await);
    assert_eq!((usage.requests, usage.output_tokens), (1, answer.usage().1));

    cluster.restart().await;
    assert_eq!((&cluster.api_key, &cluster.admin_key, &cluster.model), (&key, &admin_key, &model));
    assert_eq!(cluster.usage(&[]).await, usage);
    assert_eq!(cluster.balance_pico().await, balance, "no second first credit");
    let extra = extra["key"].as_str().expect("a key");
    let again = cluster.post("/chat/completions", extra, &cluster.question("What is a lock?", 12)).await;
    assert_eq!(again.content(), answer.content());
    cluster.settled().await;
    assert_eq!(cluster.usage(&[]).await.requests, 2);
    cluster.finish().await;
}

/// A full disk under the log, or a log nobody reads, loses the log and nothing else.
#[tokio::test]
async fn a_log_that_cannot_be_written_stops_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let data_dir = folder.path().join("data").display().to_string();
    let args = ["up", "--data-dir", &data_dir, "--listen", "127.0.0.1:0", "--json"];
    let mut process = Process::spawn("sluice", args, Path::new("/dev/full"));
    let ready = process.announcement().await;
    let field = |name: &str| ready[name].as_str().expect("announced").to_owned();
    let body = serde_json::json!({
        "model": "sluice-demo", "max_tokens": 2, "messages": [{ "role": "user", "content": "Hello!" }],
    });
    let url = format!("{}/chat/completions", field("base_url"));
    let request = reqwest::Client::new().post(url).bearer_auth(field("api_key")).json(&body);
    let reply = request.send().await.expect("an answer");
    assert_eq!(reply.status(), 200);
    process.signal(Signal::Terminate);
    let (status, _) = process.exit().await;
    assert!(status.success(), "a drain exits with 0, not {status}");
}

/// Prices go back by a new book, not by an old file: what is in the file and what bills are priced by never differ.
#[tokio::test]
async fn a_price_file_that_is_not_in_force_is_refused() {
    let mut cluster = Cluster::start().await;
    let (data_dir, path) = (cluster.data_dir(), cluster.data_dir().join("prices.toml"));
    let first = std::fs::read_to_string(&path).expect("prices");
    cluster.stop(Signal::Terminate).await;
    let dearer = first.replace("\"2.20\"", "\"22.0\"");
    assert_ne!(dearer, first);
    std::fs::write(&path, &dearer).expect("write");
    cluster.restart().await;
    cluster.stop(Signal::Terminate).await;

    let data_dir = data_dir.display().to_string();
    let args = ["--data-dir", &data_dir, "--listen", "127.0.0.1:0"];
    for not_in_force in [first, dearer.replace("2026-01-01", "2999-01-01")] {
        std::fs::write(&path, not_in_force).expect("write");
        check_refusal("prices that are not in force", &args, &["prices.toml", "effective_from"]).await;
    }
    std::fs::write(&path, &dearer).expect("write");
    cluster.restart().await;
    cluster.finish().await;
}

#[tokio::test]
async fn no_secret_lies_open_in_the_data_directory() {
    use std::os::unix::fs::PermissionsExt;
    let mut cluster = Cluster::start().await;
    let made = cluster.cli(&["keys", "create"]).await;
    let made = made["key"].as_str().expect("a key").to_owned();
    cluster.post("/chat/completions", &made, &cluster.question("a secret river", 2)).await.ok();
    cluster.stop(Signal::Terminate).await;

    let others = |path: &Path| std::fs::metadata(path).expect("metadata").permissions().mode() & 0o077;
    assert_eq!(others(&cluster.data_dir()), 0, "the folder is its owner's alone");
    let mut files = 0;
    let mut folders = vec![cluster.data_dir()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("readable") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            files += 1;
            let bytes = std::fs::read(&path).expect("readable");
            let holds = |secret: &str| bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!holds(&made), "a key in {}", path.display());
            assert!(!holds("a secret river"), "a prompt in {}", path.display());
        }
    }
    assert!(files > 0);
    cluster.finish().await;
}

/// A failed `sluice up`: it exits with an error, prints nothing on stdout, and says all of `hints` on stderr.
async fn check_refusal(case: &str, args: &[&str], hints: &[&str]) {
    let output = run_to_end("sluice", ["up", "--json"].iter().chain(args)).await;
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(!output.status.success(), "{case}: it must not start");
    assert_eq!(stdout, "", "{case}: nothing is announced");
    for hint in hints {
        assert!(stderr.contains(hint), "{case}: no {hint:?} in: {stderr}");
    }
    assert!(!stderr.contains("panicked"), "{case}: {stderr}");
}

#[tokio::test]
async fn starts_that_cannot_work_say_what_to_do() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let data = data.to_str().expect("UTF-8");
    let file = folder.path().join("a-file");
    std::fs::write(&file, "no folder").expect("written");
    let file = file.to_str().expect("UTF-8");
    let below_file = format!("{file}/data");
    let any = "127.0.0.1:0";

    let taken = std::net::TcpListener::bind(any).expect("a port");
    let taken = taken.local_addr().expect("an address").to_string();
    check_refusal("port taken", &["--data-dir", data, "--listen", &taken], &[&taken, "--listen"]).await;
    check_refusal("no address", &["--data-dir", data, "--listen", "nonsense"], &["nonsense", "--listen"])
        .await;
    check_refusal("not ours", &["--data-dir", data, "--listen", "192.0.2.1:0"], &["192.0.2.1"]).await;

    // Root may write anywhere a folder can be, so these are places where none can.
    for place in [file, &below_file, "/proc/sluice", "/dev/null/sluice"] {
        check_refusal(place, &["--data-dir", place, "--listen", any], &[place, "--data-dir"]).await;
    }
    check_refusal("unknown flag", &["--dta-dir", data], &["--dta-dir"]).await;
    check_refusal("no such config", &["--config", "/no/such.toml"], &["/no/such.toml"]).await;
}

#[tokio::test]
async fn a_data_directory_serves_one_process() {
    let cluster = Cluster::start().await;
    let data = cluster.data_dir();
    let data = data.to_str().expect("UTF-8");
    check_refusal("in use", &["--data-dir", data, "--listen", "127.0.0.1:0"], &[data, "--data-dir"]).await;
    cluster.chat(&cluster.question("Still there?", 2)).await.ok();
    cluster.finish().await;
}

#[tokio::test]
async fn a_model_that_cannot_be_served_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let data = folder.path().join("data");
    let check = async |case: &str, model: &Path, hints: &[&str]| {
        let (data, model) = (data.to_str().expect("UTF-8"), model.to_str().expect("UTF-8"));
        let args = ["--data-dir", data, "--listen", "127.0.0.1:0", "--model", model];
        check_refusal(case, &args, hints).await;
    };
    check("missing", Path::new("/no/such/model"), &["/no/such/model"]).await;
    check("empty", folder.path(), &["config.json"]).await;

    let damage = |file: &str, change: &dyn Fn(Vec<u8>) -> Option<Vec<u8>>| {
        let copy = copy_of(&bundled_model());
        let path = copy.path().join(file);
        match change(std::fs::read(&path).expect("readable")) {
            Some(bytes) => std::fs::write(&path, bytes).expect("written"),
            None => std::fs::remove_file(&path).expect("removed"),
        }
        copy
    };
    let weights = "model.safetensors";
    for (case, copy, hint) in [
        ("no config", damage("config.json", &|_| None), "config.json"),
        ("no tokenizer", damage("tokenizer.json", &|_| None), "tokenizer.json"),
        ("no weights", damage(weights, &|_| None), "safetensors"),
        (
            "a cut config",
            damage("config.json", &|bytes| Some(bytes[..bytes.len() / 2].to_vec())),
            "config.json",
        ),
        (
            "a cut tokenizer",
            damage("tokenizer.json", &|bytes| Some(bytes[..1000].to_vec())),
            "tokenizer.json",
        ),
        ("cut weights", damage(weights, &|bytes| Some(bytes[..bytes.len() - 4096].to_vec())), weights),
        ("weights cut in the header", damage(weights, &|bytes| Some(bytes[..100].to_vec())), weights),
        ("empty weights", damage(weights, &|_| Some(Vec::new())), weights),
        (
            "an absurd header length",
            damage(weights, &|mut bytes| {
                bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
                Some(bytes)
            }),
            weights,
        ),
    ] {
        check(case, copy.path(), &[hint]).await;
    }

    // Configurations that parse, and cannot be computed: the field is named.
    let edit = |field: &str, value: serde_json::Value| {
        damage("config.json", &|bytes| {
            let mut config: serde_json::Value = serde_json::from_slice(&bytes).expect("JSON");
            config[field] = value.clone();
            Some(config.to_string().into_bytes())
        })
    };
    for (field, value) in [
        ("model_type", "llama".into()),
        ("hidden_size", 0.into()),
        ("hidden_size", (-256).into()),
        ("num_experts_per_tok", 1000.into()),
        ("num_hidden_layers", 7.into()),
        ("layer_types", serde_json::json!(["quadratic_attention"])),
        ("hidden_act", "mystery".into()),
    ] {
        let copy = edit(field, value.clone());
        check(&format!("{field} = {value}"), copy.path(), &[field]).await;
    }
    // One tensor has not the shape the configuration asks for.
    check("another vocabulary", edit("vocab_size", 1234.into()).path(), &["embed_tokens", "1234"]).await;
}

#[tokio::test]
async fn a_stop_lets_streams_finish_and_bills_them() {
    for signal in [Signal::Terminate, Signal::Interrupt] {
        let mut cluster = endless().await;
        let body = cluster.question("A long tale, please.", 600);
        let mut streams = Vec::new();
        for _ in 0..4 {
            let mut stream = cluster.open_chat(&body).await;
            stream.read_frames(3).await;
            streams.push(stream);
        }
        cluster.signal(signal);
        let finished = join_all(streams.into_iter().map(|stream| stream.finish())).await;
        for transcript in &finished {
            assert_eq!(transcript.usage().1, 600, "the stream is whole");
            assert_eq!(transcript.finish_reason.as_deref(), Some("length"));
            assert_eq!(transcript.content, finished[0].content);
        }
        cluster.ended(signal).await;
        let usage = cluster.usage(&[]).await;
        assert_eq!((usage.requests, usage.output_tokens), (4, 2400), "{signal:?}: all of it is billed");
        cluster.finish().await;
    }
}

#[tokio::test]
async fn a_draining_platform_takes_nothing_new() {
    let mut cluster = endless().await;
    let mut stream = cluster.open_chat(&cluster.question("A long tale, please.", 3_000)).await;
    stream.read_frames(3).await;
    cluster.signal(Signal::Terminate);
    let body = cluster.question("May I?", 1);
    eventually("new requests are turned away", async || {
        let request = cluster.request("POST", "/chat/completions").bearer_auth(&cluster.api_key).json(&body);
        match request.send().await {
            Ok(response) if response.status() == 200 => Err("still served".to_owned()),
            Ok(response) => {
                assert_eq!(response.status(), 503, "a refusal while draining can be retried elsewhere");
                Ok(())
            }
            Err(error) if error.is_connect() => Ok(()),
            Err(error) => Err(format!("{error:?}")),
        }
    })
    .await;
    assert_eq!(stream.finish().await.usage().1, 3_000);
    cluster.ended(Signal::Terminate).await;
    cluster.finish().await;
}

/// A crash loses no completed answer, charges for none that was not, and leaves nothing held.
#[tokio::test]
async fn a_crash_loses_and_doubles_nothing() {
    let mut cluster = endless().await;
    let before = cluster.balance_pico().await;
    let (mut requests, mut completion) = (0, 0);
    for round in 0..3 {
        for tokens in [1, 9] {
            completion += cluster.stream_chat(&cluster.question("Short.", tokens)).await.usage().1;
            requests += 1;
        }
        let mut cut = Vec::new();
        for _ in 0..5 {
            let mut stream = cluster.open_chat(&cluster.question("A long tale, please.", 10_000)).await;
            stream.read_frames(2 + round * 7).await;
            cut.push(stream);
        }
        cluster.stop(Signal::Kill).await;
        drop(cut);
        cluster.restart().await;
        let usage = cluster.usage_of_requests(requests).await;
        assert_eq!((usage.requests, usage.output_tokens), (requests, completion), "round {round}");
        assert_eq!(before - cluster.balance_pico().await, usage.cost_pico);
        cluster.assert_books_balance().await;
    }
    cluster.chat(&cluster.question("And now?", 2)).await.ok();
    cluster.finish().await;
}

/// Killed while many short requests complete: what a client saw whole is billed; what is billed beyond that was in
/// flight at the kill.
#[tokio::test]
async fn a_crash_under_load_keeps_every_answer_that_arrived() {
    const CLIENTS: usize = 8;
    let mut cluster = endless().await;
    let (mut seen_requests, mut seen_tokens, mut in_flight_max) = (0, 0, 0);
    for _ in 0..3 {
        let arrived = std::cell::Cell::new((0_u64, 0_u64));
        let clients = join_all((0..CLIENTS).map(|number| {
            let (cluster, arrived) = (&cluster, &arrived);
            async move {
                let body = cluster.question(&format!("Client {number}."), 3 + number as u32);
                loop {
                    let request = cluster.request("POST", "/chat/completions").bearer_auth(&cluster.api_key);
                    let Ok(response) = request.json(&body).send().await else { return };
                    assert_eq!(response.status(), 200);
                    let Ok(answer) = response.json::<serde_json::Value>().await else { return };
                    let tokens = answer["usage"]["completion_tokens"].as_u64().expect("usage");
                    let (requests, total) = arrived.get();
                    arrived.set((requests + 1, total + tokens));
                }
            }
        }));
        let killer = async {
            eventually("forty answers arrive", async || match arrived.get().0 {
                enough if enough >= 40 => Ok(()),
                few => Err(format!("{few} answers")),
            })
            .await;
            cluster.signal(Signal::Kill);
        };
        tokio::join!(clients, killer);
        cluster.ended(Signal::Kill).await;
        seen_requests += arrived.get().0;
        seen_tokens += arrived.get().1;
        in_flight_max += CLIENTS as u64;
        cluster.restart().await;
    }
    let usage = cluster.usage_of_requests(seen_requests).await;
    assert!(
        (seen_requests..=seen_requests + in_flight_max).contains(&usage.requests),
        "{seen_requests}: {usage:?}"
    );
    assert!(usage.output_tokens >= seen_tokens, "{seen_tokens}: {usage:?}");
    cluster.finish().await;
}

#[tokio::test]
async fn help_and_version_teach() {
    for (program, commands) in
        [("sluice", &["up", "keys", "usage", "audit"][..]), ("sluice-node", &["serve", "generate"])]
    {
        let output = run_to_end(program, ["--help"]).await;
        let help = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success());
        for command in commands {
            assert!(help.contains(command), "{program} --help names {command}: {help}");
            let output = run_to_end(program, [command, "--help"]).await;
            assert!(output.status.success() && !output.stdout.is_empty(), "{program} {command} --help");
        }
        let output = run_to_end(program, ["--version"]).await;
        assert!(String::from_utf8_lossy(&output.stdout).contains(env!("CARGO_PKG_VERSION")));
    }
}
