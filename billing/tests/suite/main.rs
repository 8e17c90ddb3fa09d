//! Money from outside: real files, the public face, and the database that an auditor would open.

mod audit;
mod budgets;
mod crash;
mod exports;
mod history;
mod lifecycle;
mod notices;
mod prices;
mod receipts;
mod support;
