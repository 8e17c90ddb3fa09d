//! Where a webhook may go. A URL is a customer's wish; what it resolves to is checked again at each connection.
//!
//! Without this check, whoever may register an endpoint could make the gateway call what only the gateway can reach: its
//! own loopback, the hosts of its network, a cloud's metadata service. A name that resolves to a public address when it is
//! registered can resolve to a private one when it is called, so the resolved address is what is checked, and exactly that
//! address is what is connected to.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use url::{Host, Url};

use super::WebhookSettings;

const URL_BYTES_MAX: usize = 2048;

/// The URL of an endpoint, with a scheme and a host that the settings permit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    url: Url,
}

impl Target {
    /// The error goes on from the field's name.
    pub fn parse(text: &str, settings: &WebhookSettings) -> Result<Target, String> {
        if text.len() > URL_BYTES_MAX {
            return Err(format!("must be at most {URL_BYTES_MAX} bytes long"));
        }
        let url =
            Url::parse(text).map_err(|error| format!("is not a URL ({error}); write https://HOST/PATH"))?;
        match url.scheme() {
            "https" => {}
            "http" if settings.allow_http => {}
            "http" => {
                return Err(
                    "must begin with https://: the operator permits no other (webhooks.allow_http)".into()
                );
            }
            other => return Err(format!("must begin with https://, not {other}:")),
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(
                "must not carry a user name or a password; receivers check the signature instead".into()
            );
        }
        if url.fragment().is_some() {
            return Err("must not end in a fragment (#...): it is never sent".into());
        }
        let literal = match url.host() {
            None => return Err("must name a host".into()),
            Some(Host::Domain(_)) => None,
            Some(Host::Ipv4(address)) => Some(IpAddr::V4(address)),
            Some(Host::Ipv6(address)) => Some(IpAddr::V6(address)),
        };
        match literal.filter(|address| !is_permitted(*address, settings)) {
            Some(address) => Err(format!(
                "must be a public host: {address} is not a public address, and the operator permits no other \
                 (webhooks.allow_private_addresses)"
            )),
            None => Ok(Target { url }),
        }
    }

    pub fn as_str(&self) -> &str {
        self.url.as_str()
    }

    pub fn is_https(&self) -> bool {
        self.url.scheme() == "https"
    }

    /// The host as it is looked up and as its certificate names it: IPv6 addresses without brackets.
    pub fn host(&self) -> String {
        match self.url.host().expect("a target has a host") {
            Host::Domain(name) => name.to_owned(),
            Host::Ipv4(address) => address.to_string(),
            Host::Ipv6(address) => address.to_string(),
        }
    }

    pub fn port(&self) -> u16 {
        self.url.port_or_known_default().expect("http and https have default ports")
    }

    /// The `Host` header: the port only where it is not the scheme's own.
    pub fn authority(&self) -> String {
        let host = self.url.host_str().expect("a target has a host");
        match self.url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    pub fn path_and_query(&self) -> String {
        match self.url.query() {
            Some(query) => format!("{}?{query}", self.url.path()),
            None => self.url.path().to_owned(),
        }
    }
}

/// Of what a host resolved to, the addresses that may be connected to.
pub fn permitted(resolved: impl Iterator<Item = SocketAddr>, settings: &WebhookSettings) -> Vec<SocketAddr> {
    resolved.filter(|address| is_permitted(address.ip(), settings)).take(settings.addresses_max).collect()
}

fn is_permitted(address: IpAddr, settings: &WebhookSettings) -> bool {
    settings.allow_private_addresses || is_public(address)
}

/// Whether an address is one of the public internet, by the IANA special-purpose registries (RFC 6890 and its updates).
fn is_public(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => is_public_v4(address),
        IpAddr::V6(address) => is_public_v6(address),
    }
}

fn is_public_v4(address: Ipv4Addr) -> bool {
    !matches!(
        address.octets(),
        [0, ..]                                      // this network
            | [10, ..]                               // private
            | [100, 64..=127, ..]                    // carrier-grade NAT
            | [127, ..]                              // loopback
            | [169, 254, ..]                         // link-local, and metadata services
            | [172, 16..=31, ..]                     // private
            | [192, 0, 0 | 2, _]                     // protocol assignments, documentation
            | [192, 88, 99, _]                       // 6to4 relays
            | [192, 168, ..]                         // private
            | [198, 18..=19, ..]                     // benchmarks
            | [198, 51, 100, _]                      // documentation
            | [203, 0, 113, _]                       // documentation
            | [224..=255, ..] // multicast, reserved, broadcast
    )
}

/// Public is what lies in 2000::/3 and has no special purpose. An IPv4 address inside an IPv6 one counts as itself.
fn is_public_v6(address: Ipv6Addr) -> bool {
    if let Some(mapped) = address.to_ipv4_mapped() {
        return is_public_v4(mapped);
    }
    let segments = address.segments();
    let embedded = |high: u16, low: u16| {
        let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
        is_public_v4(Ipv4Addr::new(a, b, c, d))
    };
    match segments {
        // NAT64 and 6to4 lead to the IPv4 address that they carry.
        [0x64, 0xff9b, 0, 0, 0, 0, high, low] => embedded(high, low),
        [0x2002, high, low, ..] => embedded(high, low),
        // Protocol assignments, Teredo among them, and documentation.
        [0x2001, 0..=0x1ff, ..] | [0x2001, 0xdb8, ..] | [0x3fff, 0..=0xfff, ..] => false,
        [first, ..] => first & 0xe000 == 0x2000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_public_internet_is_public() {
        for (text, expect) in [
            ("8.8.8.8", true),
            ("100.63.255.255", true),
            ("172.32.0.1", true),
            ("192.0.1.1", true),
            ("223.255.255.255", true),
            ("0.0.0.0", false),
            ("10.0.0.7", false),
            ("100.64.0.1", false),
            ("127.0.0.1", false),
            ("127.255.255.255", false),
            ("169.254.169.254", false),
            ("172.16.0.1", false),
            ("172.31.255.255", false),
            ("192.0.0.8", false),
            ("192.0.2.1", false),
            ("192.168.1.1", false),
            ("198.19.255.255", false),
            ("224.0.0.1", false),
            ("255.255.255.255", false),
            ("2606:4700:4700::1111", true),
            ("2001:4860:4860::8888", true),
            ("::", false),
            ("::1", false),
            ("::ffff:127.0.0.1", false),
            ("::ffff:8.8.8.8", true),
            ("::127.0.0.1", false),
            ("64:ff9b::a9fe:a9fe", false),
            ("64:ff9b::808:808", true),
            ("64:ff9b:1::1", false),
            ("2002:7f00:1::", false),
            ("2002:808:808::1", true),
            ("2001::1", false),
            ("2001:db8::1", false),
            ("3fff::1", false),
            ("fc00::1", false),
            ("fd12:3456::1", false),
            ("fe80::1", false),
            ("fec0::1", false),
            ("ff02::1", false),
        ] {
            assert_eq!(is_public(text.parse().expect("an address")), expect, "{text}");
        }
    }

    fn check(text: &str, settings: &WebhookSettings, expect: &str) {
        let got = match Target::parse(text, settings) {
            Ok(target) => format!("{} {} {}", target.authority(), target.port(), target.path_and_query()),
            Err(fault) => fault,
        };
        assert!(got.contains(expect), "{text}: {got}");
    }

    #[test]
    fn a_url_is_taken_apart_and_its_faults_are_named() {
        let strict = WebhookSettings::default();
        check("https://hooks.example.com/a?b=c", &strict, "hooks.example.com 443 /a?b=c");
        check("https://hooks.example.com:8443", &strict, "hooks.example.com:8443 8443 /");
        check("https://[2606:4700:4700::1111]/", &strict, "[2606:4700:4700::1111] 443 /");
        check("http://hooks.example.com/", &strict, "must begin with https://");
        check("ftp://hooks.example.com/", &strict, "must begin with https://, not ftp:");
        check("hooks.example.com", &strict, "is not a URL");
        check("https://user:secret@hooks.example.com/", &strict, "must not carry a user name");
        check("https://hooks.example.com/#top", &strict, "fragment");
        check(&format!("https://hooks.example.com/{}", "a".repeat(2048)), &strict, "at most 2048 bytes");
    }

    #[test]
    fn private_addresses_hide_in_no_spelling() {
        let strict = WebhookSettings::default();
        for text in [
            "https://127.0.0.1/",
            "https://127.1/",
            "https://2130706433/",
            "https://0x7f.0.0.1/",
            "https://0177.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://169.254.169.254/latest/meta-data/",
        ] {
            check(text, &strict, "is not a public address");
        }
        let open =
            WebhookSettings { allow_private_addresses: true, allow_http: true, ..WebhookSettings::default() };
        check("http://127.1:9000/hook", &open, "127.0.0.1:9000 9000 /hook");
        let resolved =
            ["10.0.0.1:443", "8.8.8.8:443", "[::1]:443"].map(|text| text.parse().expect("an address"));
        assert_eq!(permitted(resolved.into_iter(), &strict), [resolved[1]]);
        assert_eq!(permitted(resolved.into_iter(), &open).len(), 3);
    }
}
