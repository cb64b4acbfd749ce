//! Which database: a file of SQLite, or a PostgreSQL server. Parsed before anything is opened; passwords
//! never show.

use std::fmt;
use std::io::Read as _;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use url::{Host, Url};

/// A URL is an address and a few options; nothing near this long is one.
const URL_LIMIT_BYTES: usize = 4_096;
/// The same for what a password file holds.
const PASSWORD_LIMIT_BYTES: u64 = 1_024;
/// What may stand behind the `?`: what else PostgreSQL's clients know (`options` above all) could undo the
/// time-outs and the isolation that the registry rests on.
const OPTIONS: [&str; 8] =
    ["host", "port", "dbname", "user", "application_name", "sslmode", "sslrootcert", "sslcert"];
/// As above; its value is a path, like that of `sslrootcert` and `sslcert`.
const KEY_OPTION: &str = "sslkey";

/// Where the registry is kept: `sqlite:PATH`, a plain path, or `postgres://USER@HOST/DATABASE`.
#[derive(Clone, PartialEq, Eq)]
pub enum Database {
    /// An SQLite file.
    Sqlite(PathBuf),
    /// A PostgreSQL server.
    Postgres(Server),
}

/// How to reach a PostgreSQL server. Shows as its URL without the password.
#[derive(Clone, PartialEq, Eq)]
pub struct Server {
    url: Url,
}

/// Why a text names no database. Never holds the text: it may hold a password.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DatabaseError {
    /// It is no URL, or too long.
    #[error("it is no URL: {0}")]
    NotAUrl(String),
    /// Neither `sqlite:` nor `postgres:`.
    #[error("{0:?} databases are not known; give a path, sqlite:PATH or postgres://USER@HOST/DATABASE")]
    Scheme(String),
    /// Something is missing.
    #[error("it does not say {0}")]
    Lacks(&'static str),
    /// An option that is not allowed.
    #[error("the option {0:?} is not known; known are {known} and sslkey", known = OPTIONS.join(", "))]
    Option(String),
    /// Without `verify-full` someone on the way reads, and changes, what the manager decides by.
    #[error("sslmode {0:?} does not do for a server that is reached over a network: it must be verify-full")]
    Insecure(String),
    /// The password is not to be had.
    #[error("the password file {file}: {why}")]
    Password {
        /// Where it was looked for.
        file: PathBuf,
        /// What is wrong.
        why: String,
    },
}

impl Database {
    /// The same with the password of a file, which must not be open to everybody. A line feed at its end is
    /// no part of it. SQLite has no password.
    ///
    /// # Errors
    /// [`DatabaseError::Password`].
    pub fn with_password_file(self, file: &Path) -> Result<Self, DatabaseError> {
        let bad = |why: String| DatabaseError::Password { file: file.to_owned(), why };
        let Self::Postgres(mut server) = self else {
            return Err(bad("the registry is an SQLite file, which has no password".to_owned()));
        };
        if server.has_password() {
            return Err(bad("the URL holds a password as well".to_owned()));
        }
        // The driver decodes what stands in a URL, and `set_password` leaves percent signs as they are.
        let password = read_password(file).map_err(bad)?.replace('%', "%25");
        server.url.set_password(Some(&password)).map_err(|()| bad("the URL names no host".to_owned()))?;
        Ok(Self::Postgres(server))
    }
}

fn read_password(file: &Path) -> Result<String, String> {
    let open = std::fs::File::open(file).map_err(|e| e.to_string())?;
    let mode = open.metadata().map_err(|e| e.to_string())?.permissions().mode() & 0o777;
    if mode & 0o007 != 0 {
        return Err(format!("it is open to everybody (mode {mode:o}); make it 600"));
    }
    let mut text = String::new();
    open.take(PASSWORD_LIMIT_BYTES + 1).read_to_string(&mut text).map_err(|e| e.to_string())?;
    let password = text.trim_end_matches(['\r', '\n']);
    if password.is_empty() || text.len() as u64 > PASSWORD_LIMIT_BYTES {
        return Err(format!("it must hold 1 to {PASSWORD_LIMIT_BYTES} bytes"));
    }
    Ok(password.to_owned())
}

impl Server {
    /// Its URL, with the password: for the driver only.
    pub(crate) fn url(&self) -> &str {
        self.url.as_str()
    }

    fn has_password(&self) -> bool {
        self.url.password().is_some()
    }

    fn parse(text: &str) -> Result<Self, DatabaseError> {
        let mut url = Url::parse(text).map_err(|e| DatabaseError::NotAUrl(e.to_string()))?;
        let mut named = Reach::of(&url);
        for (key, value) in url.query_pairs() {
            if !OPTIONS.contains(&&*key) && key != KEY_OPTION {
                return Err(DatabaseError::Option(key.into_owned()));
            }
            match &*key {
                "host" => named.reach(&value),
                "dbname" => named.database |= !value.is_empty(),
                "user" => named.user |= !value.is_empty(),
                "sslmode" => named.mode = Some(value.into_owned()),
                _ => {}
            }
        }
        let mode = named.mode()?;
        // Said always: what the environment (PGSSLMODE) says must not count.
        if named.mode.is_none() {
            url.query_pairs_mut().append_pair("sslmode", mode);
        }
        Ok(Self { url })
    }
}

/// What a URL says of the way to the server.
struct Reach {
    host: Option<Way>,
    database: bool,
    user: bool,
    mode: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Socket,
    Loopback,
    Network,
}

impl Reach {
    fn of(url: &Url) -> Self {
        let mut reach = Self {
            host: None,
            database: !url.path().trim_start_matches('/').is_empty(),
            user: !url.username().is_empty(),
            mode: None,
        };
        match url.host() {
            None => {}
            Some(Host::Domain(name)) => reach.reach(&name.replace("%2F", "/").replace("%2f", "/")),
            Some(Host::Ipv4(address)) => reach.reach(&address.to_string()),
            Some(Host::Ipv6(address)) => reach.reach(&address.to_string()),
        }
        reach
    }

    fn reach(&mut self, host: &str) {
        let loopback =
            host == "localhost" || host.parse::<IpAddr>().is_ok_and(|a| a.to_canonical().is_loopback());
        self.host = match () {
            () if host.is_empty() => self.host,
            () if host.starts_with('/') => Some(Way::Socket),
            () if loopback => Some(Way::Loopback),
            () => Some(Way::Network),
        };
    }

    fn mode(&self) -> Result<&'static str, DatabaseError> {
        let way = self.host.ok_or(DatabaseError::Lacks("the host, or the folder of the server's socket"))?;
        if !self.database {
            return Err(DatabaseError::Lacks("the database"));
        }
        if !self.user {
            return Err(DatabaseError::Lacks("the user"));
        }
        match (way, self.mode.as_deref()) {
            (Way::Network, None) | (_, Some("verify-full")) => Ok("verify-full"),
            (Way::Socket | Way::Loopback, None | Some("disable")) => Ok("disable"),
            (_, Some(other)) => Err(DatabaseError::Insecure(other.to_owned())),
        }
    }
}

impl FromStr for Database {
    type Err = DatabaseError;

    fn from_str(text: &str) -> Result<Self, DatabaseError> {
        if text.len() > URL_LIMIT_BYTES {
            return Err(DatabaseError::NotAUrl(format!("it is longer than {URL_LIMIT_BYTES} bytes")));
        }
        let (scheme, rest) = match text.split_once(':') {
            Some((scheme, rest)) if scheme.bytes().all(|b| b.is_ascii_alphanumeric()) => (scheme, rest),
            _ => ("sqlite", text),
        };
        match scheme {
            "sqlite" => match rest.strip_prefix("//").unwrap_or(rest) {
                "" => Err(DatabaseError::Lacks("the file")),
                // In SQLite's own URLs these begin options, in sqlx's as well.
                path if path.contains(['?', '#', '%', '\0']) => {
                    Err(DatabaseError::NotAUrl("the path holds '?', '#', '%' or a zero byte".to_owned()))
                }
                path => Ok(Self::Sqlite(PathBuf::from(path))),
            },
            "postgres" | "postgresql" => Server::parse(text).map(Self::Postgres),
            other => Err(DatabaseError::Scheme(other.to_owned())),
        }
    }
}

impl From<&Path> for Database {
    fn from(path: &Path) -> Self {
        Self::Sqlite(path.to_owned())
    }
}

impl fmt::Display for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sqlite(path) => write!(f, "sqlite:{}", path.display()),
            Self::Postgres(server) => server.fmt(f),
        }
    }
}

impl fmt::Debug for Database {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = self.url.clone();
        if shown.password().is_some() && shown.set_password(Some("***")).is_err() {
            return f.write_str("postgres://***");
        }
        f.write_str(shown.as_str())
    }
}

impl fmt::Debug for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn check(text: &str, expect: Result<&str, &str>) {
        match (text.parse::<Database>(), expect) {
            (Ok(database), Ok(shown)) => assert_eq!(database.to_string(), shown, "{text}"),
            (Err(error), Err(part)) => {
                assert!(error.to_string().contains(part), "{text}: {error} does not say {part}");
                assert!(!error.to_string().contains("hunter2"), "{error} shows the password");
            }
            (got, expect) => panic!("{text}: {got:?}, expected {expect:?}"),
        }
    }

    #[test]
    fn paths_and_urls_are_told_apart() {
        check("/var/lib/x/registry.db", Ok("sqlite:/var/lib/x/registry.db"));
        check("registry.db", Ok("sqlite:registry.db"));
        check("sqlite:/x.db", Ok("sqlite:/x.db"));
        check("sqlite:///x.db", Ok("sqlite:/x.db"));
        check("sqlite:", Err("the file"));
        check("/x.db?mode=memory", Err("'?'"));
        check("mysql://u:hunter2@h/d", Err("\"mysql\""));
        check(&format!("postgres://{}", "x".repeat(5_000)), Err("longer"));
    }

    #[test]
    fn a_server_over_a_network_must_prove_itself() {
        check("postgres://u@db.example/o", Ok("postgres://u@db.example/o?sslmode=verify-full"));
        check(
            "postgres://u@db.example/o?sslmode=verify-full",
            Ok("postgres://u@db.example/o?sslmode=verify-full"),
        );
        for mode in ["disable", "allow", "prefer", "require", "verify-ca", "nonsense", ""] {
            check(&format!("postgres://u:hunter2@db.example/o?sslmode={mode}"), Err("verify-full"));
        }
        check("postgres://u@127.0.0.1:5433/o", Ok("postgres://u@127.0.0.1:5433/o?sslmode=disable"));
        check("postgres://u@[::1]/o", Ok("postgres://u@[::1]/o?sslmode=disable"));
        check("postgres://u@localhost/o?sslmode=prefer", Err("prefer"));
        check("postgres://u@%2Frun%2Fpg/o", Ok("postgres://u@%2Frun%2Fpg/o?sslmode=disable"));
        check(
            "postgres://u@localhost/o?host=/run/pg",
            Ok("postgres://u@localhost/o?host=/run/pg&sslmode=disable"),
        );
        // The last host counts, as it does for the driver.
        check("postgres://u@localhost/o?host=db.example&sslmode=disable", Err("verify-full"));
        check("postgres://u@127.0.0.1.example/o?sslmode=disable", Err("verify-full"));
    }

    #[test]
    fn what_is_missing_or_not_allowed_is_named() {
        check("postgres://u:hunter2@h", Err("the database"));
        check("postgres://h/d", Err("the user"));
        check("postgres:///d?user=u", Err("the host"));
        check("postgres://u:hunter2@h/d?options=-c%20fsync%3Doff", Err("\"options\""));
        check("postgres://u@h/d?password=hunter2", Err("\"password\""));
        check("postgres://u:hunter2@h:99999/d", Err("port"));
    }

    #[test]
    fn a_password_shows_nowhere() {
        let database: Database = "postgres://u:hunter2@localhost/d".parse().unwrap();
        for shown in [format!("{database}"), format!("{database:?}"), format!("{:?}", Some(&database))] {
            assert!(!shown.contains("hunter2") && shown.contains("***"), "{shown}");
        }
    }

    #[test]
    fn a_password_file_is_private_short_and_not_a_second_one() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("password");
        let database: Database = "postgres://u@localhost/d".parse().unwrap();
        let write = |text: &[u8], mode: u32| {
            std::fs::write(&file, text).unwrap();
            std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        let refused = |database: &Database, part: &str| {
            let error = database.clone().with_password_file(&file).unwrap_err().to_string();
            assert!(error.contains(part), "{error} does not say {part}");
        };
        refused(&database, "No such file");
        write(b"hunter2\n", 0o644);
        refused(&database, "open to everybody");
        write(b"", 0o600);
        refused(&database, "1 to 1024");
        write(&[b'x'; 2_000], 0o600);
        refused(&database, "1 to 1024");
        write(b"p@ss/w:rd%\n", 0o640);
        let Database::Postgres(server) = database.with_password_file(&file).unwrap() else { unreachable!() };
        assert_eq!(server.url.password(), Some("p%40ss%2Fw%3Ard%25"));
        refused(&Database::Postgres(server), "as well");
        refused(&Database::Sqlite("x".into()), "no password");
    }
}
