//! `sluice keys create | list | revoke`.

use clap::{Args, Subcommand, ValueEnum};

use super::{ConfigArgs, print_json, utc};
use crate::{
    auth::{ApiKey, Role, Tenancy},
    up::DEFAULT_PROJECT,
};

#[derive(Debug, Args)]
pub struct KeysArgs {
    #[command(subcommand)]
    command: KeysCommand,
}

#[derive(Debug, Subcommand)]
enum KeysCommand {
    /// Make a key and print it. It is stored as a hash: keep it, it is not shown again.
    Create {
        #[command(flatten)]
        config: ConfigArgs,
        /// What the key is for.
        #[arg(long, default_value = "unnamed")]
        name: String,
        #[arg(long, default_value = DEFAULT_PROJECT)]
        project: String,
        #[arg(long, value_enum, default_value = "user")]
        role: RoleArg,
        #[arg(long)]
        json: bool,
    },
    /// Every key, newest first, revoked ones among them.
    List {
        #[command(flatten)]
        config: ConfigArgs,
        #[arg(long)]
        json: bool,
    },
    /// End a key by its id (see `sluice keys list`). Servers refuse it within a second.
    Revoke {
        #[command(flatten)]
        config: ConfigArgs,
        id: String,
        #[arg(long)]
        json: bool,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum RoleArg {
    User,
    Admin,
}

impl KeysArgs {
    pub async fn run(self) -> anyhow::Result<()> {
        match self.command {
            KeysCommand::Create { config, name, project, role, json } => {
                create(config, &name, &project, role, json).await
            }
            KeysCommand::List { config, json } => list(config, json).await,
            KeysCommand::Revoke { config, id, json } => revoke(config, &id, json).await,
        }
    }
}

async fn create(
    config: ConfigArgs,
    name: &str,
    project: &str,
    role: RoleArg,
    json: bool,
) -> anyhow::Result<()> {
    let name = name.trim();
    let printable = !name.chars().any(char::is_control);
    anyhow::ensure!(
        printable && (1..=200).contains(&name.len()),
        "--name takes 1 to 200 bytes of printable text"
    );
    let (_, database) = config.database().await?;
    let role = match role {
        RoleArg::User => Role::User,
        RoleArg::Admin => Role::Admin,
    };
    let made = match Tenancy::new(database).create_key(project, name, role).await {
        Err(sqlx::Error::RowNotFound) => anyhow::bail!("--project: there is no project {project:?}"),
        made => made?,
    };
    if json {
        let mut value = serde_json::to_value(&made.key)?;
        value["key"] = made.secret.reveal().into();
        return print_json(&value);
    }
    println!("{}", made.secret.reveal());
    eprintln!("{} ({}, project {}): keep this key, it is not shown again", made.key.id, name, project);
    Ok(())
}

async fn list(config: ConfigArgs, json: bool) -> anyhow::Result<()> {
    let (_, database) = config.database().await?;
    let keys = Tenancy::new(database).keys().await?;
    if json {
        return print_json(&keys);
    }
    println!("{:<37}  {:<6}  {:<22}  {:<19}  {:<8}  NAME", "ID", "ROLE", "KEY", "CREATED (UTC)", "STATE");
    for ApiKey { id, role, redacted, created_s, revoked_s, name, .. } in keys {
        let state = if revoked_s.is_some() { "revoked" } else { "active" };
        println!("{id:<37}  {role:<6}  {redacted:<22}  {:<19}  {state:<8}  {name}", utc(created_s));
    }
    Ok(())
}

async fn revoke(config: ConfigArgs, id: &str, json: bool) -> anyhow::Result<()> {
    let (_, database) = config.database().await?;
    let Some(key) = Tenancy::new(database).revoke_key(id).await? else {
        anyhow::bail!("there is no key with id {id:?}; `sluice keys list` shows them all");
    };
    if json {
        return print_json(&key);
    }
    println!("{id} is revoked");
    Ok(())
}
