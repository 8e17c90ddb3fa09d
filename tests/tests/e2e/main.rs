//! End to end: real processes, real clients. One module a promise; every test ends with `Cluster::finish`.
#![forbid(unsafe_code)]

mod caching;
mod concurrency;
mod errors;
mod exports;
mod first_light;
mod hang_ups;
mod invoices;
mod kills;
mod lifecycle;
mod metering;
mod money;
mod node;
mod outage;
mod overspend;
mod prices;
mod receipts;
mod sdk;
mod unicode;
mod webhooks;
