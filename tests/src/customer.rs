pub struct Customer; pub struct Price;
